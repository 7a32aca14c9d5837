/* IDENTITY: one message gives this machine its identity. If a step fails, so does the message, and
 * the host does not use the machine. */
#define _GNU_SOURCE
#include "machine.h"
#include "random.h"
#include "self.h"
#include "spawn.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#ifndef RNDRESEEDCRNG
#define RNDRESEEDCRNG _IO('R', 0x07)
#endif

#define ENTROPY_MIN 32
#define HOOK_MS 30000
#define KEYGEN_MS 60000
#define NOTHING_TO_DO (-1)
#define HEX "0123456789abcdef"

enum { END_SESSIONS = 1, THAW_FIRST = 2, START_PROCESS = 4, NEW_MACHINE = 8 };

static const char hook[] = "/etc/coppice/on-fork", payload_path[] = "/run/coppice/payload";

struct identity {
    uint64_t serial, clock_ns, flags;
    const uint8_t *entropy, *payload;
    size_t entropy_size, payload_size;
    const char *hostname, *machine_id, *boot_id;
    struct strings dns;
    struct network network;
    struct strings argv, env;
    const char *cwd, *user;
    struct volume volumes[VOLUMES_MAX];
    size_t volume_count;
    struct strings certificates;
    char said[900]; /* the failed step's own message; empty if strerror is enough */
};

/* ---- the message ---- */

static bool is_name(const char *text, const char *alphabet, size_t shortest, size_t longest)
{
    size_t size = strlen(text);
    return size >= shortest && size <= longest && strspn(text, alphabet) == size;
}

/* A volume: its number, whether it is read-only, its path. */
static void take_volume(struct identity *i, struct tlv *t)
{
    bool good = t->size >= 4 && t->value[0] < VOLUMES_MAX && t->value[1] <= 1 && t->value[2] == '/' &&
                !memchr(t->value + 2, 0, t->size - 2) && i->volume_count < VOLUMES_MAX;
    if (good)
        i->volumes[i->volume_count++] = (struct volume){.number = t->value[0], .readonly = t->value[1], .path = (char *)t->value + 2};
    t->bad |= !good;
}

static void take_field(struct identity *i, struct tlv *t)
{
    uint64_t mtu;
    switch (t->tag) {
    case 1: i->serial = tlv_int(t); break;
    case 2: i->entropy = t->value; i->entropy_size = t->size; break;
    case 3: i->clock_ns = tlv_int(t); break;
    case 4: i->hostname = tlv_text(t); break;
    case 5: i->machine_id = tlv_text(t); break;
    case 6: i->boot_id = tlv_text(t); break;
    case 7: i->network.mac = t->value; t->bad |= t->size != 6; break;
    case 8: i->network.address = tlv_text(t); break;
    case 9: i->network.gateway = tlv_text(t); break;
    case 10: t->bad |= !strings_add(&i->dns, tlv_text(t)); break;
    case 11: i->payload = t->value; i->payload_size = t->size; break;
    case 12: i->flags = tlv_int(t); break;
    case 13: mtu = tlv_int(t); i->network.mtu = (uint32_t)mtu; t->bad |= mtu > UINT32_MAX; break;
    case 14: i->network.address6 = tlv_text(t); break;
    case 15: i->network.gateway6 = tlv_text(t); break;
    case 20: t->bad |= !strings_add(&i->argv, tlv_text(t)); break;
    case 21: t->bad |= !env_set(&i->env, tlv_text(t)); break;
    case 22: i->cwd = tlv_text(t); break;
    case 23: i->user = tlv_text(t); break;
    case 24: take_volume(i, t); break;
    case 25: t->bad |= !strings_add(&i->certificates, tlv_text(t)); break;
    }
}

static bool parse(struct identity *i, const struct frame *f)
{
    struct tlv t = tlv_read(f);
    while (tlv_next(&t))
        take_field(i, &t);
    for (size_t n = 0; n < i->dns.count; n++) {
        struct in6_addr address;
        if (inet_pton(AF_INET, i->dns.items[n], &address) != 1 && inet_pton(AF_INET6, i->dns.items[n], &address) != 1)
            return false;
    }
    return !t.bad && i->entropy_size >= ENTROPY_MIN && i->entropy_size <= 4096 &&
           (!i->hostname || is_name(i->hostname, HEX "ghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-.", 1, 64)) &&
           (!i->machine_id || is_name(i->machine_id, HEX, 32, 32)) && (!i->boot_id || is_name(i->boot_id, HEX "-", 36, 36));
}

/* ---- the steps, in their order ---- */

/* Set the message of a failed step. */
static int explain(struct identity *i, const char *what, int error)
{
    snprintf(i->said, sizeof i->said, "%.150s: %s", what, strerror(error));
    return error;
}

static int step_thaw(struct machine *m, struct identity *i)
{
    return i->flags & THAW_FIRST ? thaw(m) : NOTHING_TO_DO;
}

static int step_clock(struct machine *m, struct identity *i)
{
    (void)m;
    if (!i->clock_ns)
        return NOTHING_TO_DO;
    return clock_set(i->clock_ns);
}

static int step_entropy(struct machine *m, struct identity *i)
{
    union {
        struct rand_pool_info info;
        uint8_t space[sizeof(struct rand_pool_info) + 4096];
    } pool;
    pool.info.entropy_count = (int)i->entropy_size * 8;
    pool.info.buf_size = (int)i->entropy_size;
    memcpy(pool.space + sizeof pool.info, i->entropy, i->entropy_size);
    int error = ioctl(m->random, RNDADDENTROPY, &pool) < 0 || ioctl(m->random, RNDRESEEDCRNG, 0) < 0 ? errno : 0;
    explicit_bzero(&pool, sizeof pool.info + i->entropy_size);
    if (!error)
        next_generation();
    return error;
}

static int step_hostname(struct machine *m, struct identity *i)
{
    (void)m;
    char now[65];
    if (!i->hostname)
        return NOTHING_TO_DO;
    if (gethostname(now, sizeof now) < 0 || strcmp(now, i->hostname) != 0) {
        if (sethostname(i->hostname, strlen(i->hostname)) < 0)
            return errno;
    }
    int error = put_line("/etc/hostname", i->hostname, 0644);
    return error ? error : put_hosts(i->hostname);
}

static int step_machine_id(struct machine *m, struct identity *i)
{
    (void)m;
    return i->machine_id ? put_line("/etc/machine-id", i->machine_id, 0444) : NOTHING_TO_DO;
}

static int step_boot_id(struct machine *m, struct identity *i)
{
    (void)m;
    return i->boot_id ? put_line(boot_id_path, i->boot_id, 0444) : NOTHING_TO_DO;
}

static int step_random_seed(struct machine *m, struct identity *i)
{
    (void)m;
    if (!(i->flags & NEW_MACHINE))
        return NOTHING_TO_DO;
    static const char *const seeds[] = {"/var/lib/systemd/random-seed", "/var/lib/urandom/random-seed"};
    for (size_t n = 0; n < sizeof seeds / sizeof *seeds; n++) {
        int error = remove_file(seeds[n]);
        if (error)
            return explain(i, seeds[n], error);
    }
    return 0;
}

static bool is_host_key(const char *name)
{
    static const char prefix[] = "ssh_host_";
    const char *end = strstr(name, "_key");
    return strncmp(name, prefix, sizeof prefix - 1) == 0 && end && (end[4] == 0 || strcmp(end + 4, ".pub") == 0);
}

static int step_ssh_host_keys(struct machine *m, struct identity *i)
{
    (void)m;
    DIR *directory = i->flags & NEW_MACHINE ? opendir("/etc/ssh") : NULL;
    if (!directory)
        return !(i->flags & NEW_MACHINE) || errno == ENOENT || errno == ENOTDIR ? NOTHING_TO_DO : explain(i, "/etc/ssh", errno);
    int error = 0;
    bool found = false;
    struct dirent *entry;
    while (!error && (errno = 0, entry = readdir(directory)) != NULL) {
        if (is_host_key(entry->d_name)) {
            found = true;
            if (unlinkat(dirfd(directory), entry->d_name, 0) < 0)
                error = explain(i, entry->d_name, errno);
        }
    }
    if (!error && errno)
        error = explain(i, "/etc/ssh", errno);
    closedir(directory);
    if (error || !found)
        return error ? error : NOTHING_TO_DO;
    char *argv[] = {"/usr/bin/ssh-keygen", "-A", NULL}, *env[] = {"PATH=" DEFAULT_PATH, "HOME=/root", NULL};
    return access(argv[0], X_OK) < 0 ? 0 : run_and_wait(argv, env, KEYGEN_MS, i->said, sizeof i->said);
}

static int step_network(struct machine *m, struct identity *i)
{
    (void)m;
    if (!i->network.mac && !i->network.address && !i->network.gateway && !i->network.mtu && !i->network.address6 && !i->dns.count)
        return NOTHING_TO_DO;
    int error = network_set(&i->network);
    if (error || !i->dns.count)
        return error;
    char *text = NULL;
    size_t size = 0;
    FILE *stream = open_memstream(&text, &size);
    for (size_t n = 0; stream && n < i->dns.count; n++)
        fprintf(stream, "nameserver %s\n", i->dns.items[n]);
    error = !stream || fclose(stream) != 0 ? ENOMEM : put_resolv_conf(text);
    free(text);
    return error;
}

static int step_volumes(struct machine *m, struct identity *i)
{
    if (i->volume_count == 0)
        return NOTHING_TO_DO;
    if (m->mounted_count + i->volume_count > VOLUMES_MAX)
        return EBUSY;
    for (size_t n = 0; n < i->volume_count; n++) {
        char *path = strdup(i->volumes[n].path);
        int error = path ? volume_mount(&i->volumes[n]) : ENOMEM;
        if (error) {
            free(path);
            return explain(i, i->volumes[n].path, error);
        }
        m->mounted[m->mounted_count++] = path;
    }
    return 0;
}

static int step_certificates(struct machine *m, struct identity *i)
{
    (void)m;
    for (size_t n = 0; n < i->certificates.count; n++) {
        int error = trust_certificate(i->certificates.items[n], n);
        if (error)
            return error;
    }
    return i->certificates.count ? 0 : NOTHING_TO_DO;
}

static int step_payload(struct machine *m, struct identity *i)
{
    (void)m;
    int error = i->payload || i->flags & NEW_MACHINE ? remove_file(payload_path) : 0; /* it was the source's */
    if (!i->payload)
        return error ? error : NOTHING_TO_DO;
    return error ? error : put_file(payload_path, (const char *)i->payload, i->payload_size, 0600);
}

/* The hook informs running programs of the new identity. If the process has not started yet, there
 * are none. */
static int step_hook(struct machine *m, struct identity *i)
{
    (void)m;
    /* Look for it in every case: then the lookup of the boot is in the kernel's name cache, and
     * forks need not ask two file systems. */
    bool none = faccessat(AT_FDCWD, hook, X_OK, AT_EACCESS) < 0; /* access() would switch credentials, which is slower */
    if (!(i->flags & NEW_MACHINE) || i->flags & START_PROCESS || none)
        return NOTHING_TO_DO;
    char *argv[] = {(char *)hook, NULL};
    char *env[] = {"PATH=" DEFAULT_PATH, "HOME=/root", i->payload ? "COPPICE_PAYLOAD=/run/coppice/payload" : NULL, NULL};
    return run_and_wait(argv, env, HOOK_MS, i->said, sizeof i->said);
}

static int step_sessions(struct machine *m, struct identity *i)
{
    if (!(i->flags & END_SESSIONS))
        return NOTHING_TO_DO;
    (void)m;
    jobs_end_attached();
    return 0;
}

static int step_image(struct machine *m, struct identity *i)
{
    struct image *image = &m->image;
    if (!i->cwd && !i->user && i->env.count == 0)
        return NOTHING_TO_DO;
    if ((i->cwd && strlen(i->cwd) >= sizeof image->cwd) || (i->user && strlen(i->user) >= sizeof image->user))
        return ENAMETOOLONG;
    int error = i->cwd && *i->cwd ? make_directories(i->cwd) : 0; /* the image may rely on the runtime for it */
    if (error)
        return explain(i, i->cwd, error);
    strcpy(image->cwd, i->cwd ? i->cwd : "");
    strcpy(image->user, i->user ? i->user : "");
    size_t size = 0;
    for (size_t n = 0; n < i->env.count; n++) {
        size_t length = strlen(i->env.items[n]) + 1;
        if (length > sizeof image->env - size)
            return E2BIG;
        memcpy(image->env + size, i->env.items[n], length);
        size += length;
    }
    image->env_size = (uint32_t)size;
    return 0;
}

static int start_process(struct machine *m, struct identity *i, const struct account *account)
{
    if (fchown(STDERR_FILENO, account->uid, (gid_t)-1) < 0) /* for a process that reopens /dev/stdout */
        say("the console keeps its owner: %s", strerror(errno));
    struct spawn s = {.argv = i->argv.items, .env = i->env.items, .cwd = *m->image.cwd ? m->image.cwd : "/", .account = account};
    int error = process_start(&s, m->image.user);
    return error && s.failed ? explain(i, s.failed, error) : error;
}

static int step_process(struct machine *m, struct identity *i)
{
    if (!(i->flags & START_PROCESS) || i->argv.count == 0)
        return NOTHING_TO_DO;
    struct account account;
    struct strings defaults = {0};
    int error = account_find(m->image.user, &account);
    if (error)
        error = explain(i, *m->image.user ? m->image.user : "root", error);
    else
        error = env_defaults(&i->env, &account, NULL, &defaults) ? start_process(m, i, &account) : ENOMEM;
    strings_free_all(&defaults);
    account_free(&account);
    return error;
}

static const struct {
    const char *name;
    int (*run)(struct machine *, struct identity *);
} steps[] = {
    {"thaw", step_thaw},
    {"clock", step_clock},
    {"entropy", step_entropy},
    {"hostname", step_hostname},
    {"machine-id", step_machine_id},
    {"boot-id", step_boot_id},
    {"random-seed", step_random_seed},
    {"ssh-host-keys", step_ssh_host_keys},
    {"network", step_network},
    {"volumes", step_volumes},
    {"certificates", step_certificates},
    {"payload", step_payload},
    {"hook", step_hook},
    {"sessions", step_sessions},
    {"image", step_image},
    {"process", step_process},
};

static int take_steps(struct machine *m, struct identity *i, struct reply *done, const char **failed)
{
    for (size_t n = 0; n < sizeof steps / sizeof *steps; n++) {
        char line[64];
        int64_t begin = now_us();
        int error = steps[n].run(m, i);
        if (error > 0) {
            *failed = steps[n].name;
            return error;
        }
        snprintf(line, sizeof line, "%s=%lld", steps[n].name, (long long)(now_us() - begin));
        if (error != NOTHING_TO_DO)
            reply_text(done, 2, line);
    }
    return 0;
}

int identity(struct machine *m, const struct frame *f, struct reply *r)
{
    struct identity i = {0};
    const char *failed = "message";
    int error = !parse(&i, f) ? EINVAL : i.serial <= m->serial ? ESTALE : 0;
    if (!error) {
        m->serial = i.serial; /* even if a step fails: this message cannot be repeated */
        reply_int(r, 1, i.serial);
        error = take_steps(m, &i, r, &failed);
        m->identified = !error;
    }
    strings_free(&i.argv);
    strings_free(&i.env);
    strings_free(&i.dns);
    strings_free(&i.certificates);
    if (error)
        reply_error(r, error, "%s: %s", failed, i.said[0] ? i.said : strerror(error));
    else
        process_report(r);
    if (!error)
        reply_int(r, 3, clock_now()); /* last, since the host measures the clock's delay by it */
    return error;
}
