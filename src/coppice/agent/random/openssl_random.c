/* A provider of OpenSSL 3 whose random generator asks the kernel for every request.
 *
 * OpenSSL's own generators keep their state in the process, so all forks of a machine would
 * continue with the same state. This one has no state. openssl.cnf in this directory selects it.
 *
 * It is loaded into programs of any C library, so it uses none, and no header of OpenSSL: the
 * numbers and signatures below are OpenSSL's stable interface of providers (core_dispatch.h). */
#include <stddef.h>
#include <stdint.h>

#define SYS_GETRANDOM 318
#define EINTR_NUMBER (-4)
#define STRENGTH 256
#define READY 1            /* EVP_RAND_STATE_READY */
#define MAX_REQUEST 65536  /* OpenSSL splits larger ones */
#define OPERATION_RAND 5   /* OSSL_OP_RAND */

enum { CORE_MALLOC = 20, CORE_CLEAR_FREE = 23 };
enum { PROVIDER_TEARDOWN = 1024, PROVIDER_GETTABLE_PARAMS, PROVIDER_GET_PARAMS, PROVIDER_QUERY_OPERATION };
enum {
    RAND_NEWCTX = 1, RAND_FREECTX, RAND_INSTANTIATE, RAND_UNINSTANTIATE, RAND_GENERATE, RAND_RESEED, RAND_NONCE,
    RAND_ENABLE_LOCKING, RAND_LOCK, RAND_UNLOCK, RAND_GETTABLE_CTX_PARAMS = 12, RAND_GET_CTX_PARAMS = 15,
    RAND_VERIFY_ZEROIZATION = 17, RAND_GET_SEED, RAND_CLEAR_SEED,
};

struct dispatch {
    int id;
    void (*function)(void);
};

struct algorithm {
    const char *names, *properties;
    const struct dispatch *implementation;
    const char *description;
};

struct parameter {
    const char *key;
    unsigned type; /* 1: int, 2: unsigned, 6: pointer to text */
    void *data;
    size_t size, returned;
};

typedef void *malloc_function(size_t size, const char *file, int line);
typedef void clear_free_function(void *memory, size_t size, const char *file, int line);

static malloc_function *core_malloc;
static clear_free_function *core_clear_free;

static long getrandom(void *buffer, size_t size)
{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "0"(SYS_GETRANDOM), "D"(buffer), "S"(size), "d"(0) : "rcx", "r11", "memory");
    return result;
}

static int fill(uint8_t *out, size_t size)
{
    while (size > 0) {
        long got = getrandom(out, size);
        if (got == EINTR_NUMBER)
            continue;
        if (got <= 0)
            return 0;
        out += got;
        size -= (size_t)got;
    }
    return 1;
}

/* ---- the generator; a context is the address of `core_malloc`, since there is no state ---- */

static void *new_context(void *provider, void *parent, const struct dispatch *parent_calls)
{
    (void)provider, (void)parent, (void)parent_calls;
    return &core_malloc;
}

static void free_context(void *context)
{
    (void)context;
}

static int instantiate(void *context, unsigned strength, int resistance, const uint8_t *text, size_t size, const struct parameter *parameters)
{
    (void)context, (void)resistance, (void)text, (void)size, (void)parameters;
    return strength <= STRENGTH;
}

static int succeed(void *context)
{
    (void)context;
    return 1;
}

static int generate(void *context, uint8_t *out, size_t size, unsigned strength, int resistance, const uint8_t *extra, size_t extra_size)
{
    (void)context, (void)resistance, (void)extra, (void)extra_size;
    return strength <= STRENGTH && fill(out, size);
}

static int reseed(void *context, int resistance, const uint8_t *entropy, size_t size, const uint8_t *extra, size_t extra_size)
{
    (void)context, (void)resistance, (void)entropy, (void)size, (void)extra, (void)extra_size;
    return 1;
}

static size_t nonce(void *context, uint8_t *out, unsigned strength, size_t least, size_t most)
{
    (void)context, (void)strength, (void)most;
    return out == NULL || fill(out, least) ? least : 0;
}

/* For generators that a program puts on top of this one. */
static size_t get_seed(void *context, uint8_t **out, int entropy, size_t least, size_t most, int resistance, const uint8_t *extra, size_t extra_size)
{
    (void)context, (void)resistance, (void)extra, (void)extra_size;
    size_t size = entropy > 0 && (size_t)entropy / 8 > least ? (size_t)entropy / 8 : least;
    if (size > most || !core_malloc)
        return 0;
    *out = core_malloc(size, "", 0);
    if (!*out)
        return 0;
    if (fill(*out, size))
        return size;
    core_clear_free(*out, size, "", 0);
    return 0;
}

static void clear_seed(void *context, uint8_t *seed, size_t size)
{
    (void)context;
    core_clear_free(seed, size, "", 0);
}

static int same(const char *a, const char *b)
{
    while (*a && *a == *b)
        a++, b++;
    return *a == *b;
}

static int put(struct parameter *p, uint64_t value)
{
    p->returned = p->size;
    if (p->size == sizeof(uint64_t))
        *(uint64_t *)p->data = value;
    else if (p->size == sizeof(uint32_t))
        *(uint32_t *)p->data = (uint32_t)value;
    else
        return 0;
    return 1;
}

static int get_parameters(void *context, struct parameter *p)
{
    (void)context;
    int good = 1;
    for (; p && p->key; p++) {
        if (same(p->key, "state"))
            good &= put(p, READY);
        else if (same(p->key, "strength"))
            good &= put(p, STRENGTH);
        else if (same(p->key, "max_request"))
            good &= put(p, MAX_REQUEST);
    }
    return good;
}

static const struct parameter *gettable_parameters(void *context, void *provider)
{
    (void)context, (void)provider;
    static const struct parameter known[] = {
        {"state", 1, NULL, sizeof(int), 0}, {"strength", 2, NULL, sizeof(unsigned), 0}, {"max_request", 2, NULL, sizeof(size_t), 0}, {0},
    };
    return known;
}

/* ---- the provider ---- */

#define ENTRY(id, function) {id, (void (*)(void))(function)}

static const struct dispatch generator[] = {
    ENTRY(RAND_NEWCTX, new_context),
    ENTRY(RAND_FREECTX, free_context),
    ENTRY(RAND_INSTANTIATE, instantiate),
    ENTRY(RAND_UNINSTANTIATE, succeed),
    ENTRY(RAND_GENERATE, generate),
    ENTRY(RAND_RESEED, reseed),
    ENTRY(RAND_NONCE, nonce),
    ENTRY(RAND_ENABLE_LOCKING, succeed),
    ENTRY(RAND_LOCK, succeed),
    ENTRY(RAND_UNLOCK, free_context),
    ENTRY(RAND_GETTABLE_CTX_PARAMS, gettable_parameters),
    ENTRY(RAND_GET_CTX_PARAMS, get_parameters),
    ENTRY(RAND_VERIFY_ZEROIZATION, succeed),
    ENTRY(RAND_GET_SEED, get_seed),
    ENTRY(RAND_CLEAR_SEED, clear_seed),
    {0, NULL},
};

static const struct algorithm generators[] = {
    {"KERNEL-RANDOM", "provider=coppice", generator, "getrandom(2) for every request"},
    {0},
};

static const struct algorithm *query(void *provider, int operation, int *no_store)
{
    (void)provider;
    *no_store = 0;
    return operation == OPERATION_RAND ? generators : NULL;
}

static const struct parameter *gettable_descriptions(void *provider)
{
    (void)provider;
    static const struct parameter known[] = {
        {"name", 6, NULL, 0, 0}, {"version", 6, NULL, 0, 0}, {"status", 1, NULL, sizeof(int), 0}, {0},
    };
    return known;
}

static int get_descriptions(void *provider, struct parameter *p)
{
    (void)provider;
    for (; p && p->key; p++) {
        if (same(p->key, "name"))
            *(const char **)p->data = "Coppice: random numbers of the kernel";
        else if (same(p->key, "version"))
            *(const char **)p->data = "1";
        else if (same(p->key, "status") && !put(p, 1))
            return 0;
    }
    return 1;
}

__attribute__((visibility("default"))) int OSSL_provider_init(
    const void *handle, const struct dispatch *core, const struct dispatch **functions, void **context)
{
    static const struct dispatch provider[] = {
        ENTRY(PROVIDER_TEARDOWN, free_context),
        ENTRY(PROVIDER_GETTABLE_PARAMS, gettable_descriptions),
        ENTRY(PROVIDER_GET_PARAMS, get_descriptions),
        ENTRY(PROVIDER_QUERY_OPERATION, query),
        {0, NULL},
    };
    for (; core->id != 0; core++) {
        if (core->id == CORE_MALLOC)
            core_malloc = (malloc_function *)core->function;
        else if (core->id == CORE_CLEAR_FREE)
            core_clear_free = (clear_free_function *)core->function;
    }
    *functions = provider;
    *context = (void *)handle;
    return 1;
}
