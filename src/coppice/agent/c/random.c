/* Random generators inside processes. A fork has a copy of each process, so it continues with the
 * same state as its siblings, unless the generator asks the kernel or watches the generation. */
#define _GNU_SOURCE
#include "random.h"
#include "self.h"

#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PLACE "/run/coppice/"
#define PAGE 4096
#define LINE_SIZE 256 /* of a group */
#define GROUPS_MAX 32 /* of processes, in a report: all their lines fit into a reply */
_Static_assert((GROUPS_MAX + 1) * (LINE_SIZE + 5) <= sizeof((struct reply *)0)->data, "the report would be cut");
#define COUNT(array) (sizeof(array) / sizeof *(array))

/* ---- files for libraries and runtimes ---- */

/* Let OpenSSL find the configuration also in processes whose environment was cleared, if it looks
 * where Debian's does. An image that has another file there keeps it. */
static void link_openssl_configuration(void)
{
    static const char directory[] = "/usr/lib/ssl", path[] = "/usr/lib/ssl/openssl.cnf", wanted[] = PLACE "openssl.cnf";
    char target[PATH_MAX] = "";
    if (access("/usr/lib/x86_64-linux-gnu/libcrypto.so.3", F_OK) < 0)
        return;
    mkdir(directory, 0755);
    errno = 0;
    bool debian = readlink(path, target, sizeof target - 1) > 0 && strcmp(target, "/etc/ssl/openssl.cnf") == 0;
    if (!debian && errno != ENOENT)
        return; /* another file of the image */
    if (debian)
        unlink(path);
    if (symlink(wanted, path) < 0 && errno != EEXIST)
        say("%s: %s", path, strerror(errno));
}

static void make_generation(void);

void place_guest_files(int directory)
{
    DIR *files = directory < 0 ? NULL : fdopendir(directory);
    struct dirent *entry;
    while (files && (errno = 0, entry = readdir(files)) != NULL) {
        char path[NAME_MAX + sizeof PLACE];
        size_t size;
        if (entry->d_type != DT_REG)
            continue;
        snprintf(path, sizeof path, PLACE "%s", entry->d_name);
        char *data = load_open(openat(directory, entry->d_name, O_RDONLY | O_CLOEXEC), &size);
        int error = data ? put_file(path, data, size, 0444) : errno;
        if (error)
            say("%s: %s", path, strerror(error));
        free(data);
        unlinkat(directory, entry->d_name, 0); /* it takes up memory */
    }
    if (errno)
        say(PLACE ": %s", strerror(errno));
    if (files)
        closedir(files);
    link_openssl_configuration();
    make_generation();
}

/* ---- the generation: a page that libraries map and compare, as they do the device's of this name ---- */

static _Atomic uint32_t *generation;

static void make_generation(void)
{
    static const char path[] = "/dev/sysgenid";
    int fd = open(path, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0444);
    if (fd < 0)
        return; /* the kernel has the device */
    void *page = ftruncate(fd, PAGE) < 0 ? MAP_FAILED : mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (page == MAP_FAILED) {
        say("%s: %s", path, strerror(errno));
        unlink(path);
        return;
    }
    generation = page;
    next_generation(); /* 0 means that there is none */
}

void next_generation(void)
{
    if (generation)
        atomic_fetch_add(generation, 1);
}

/* ---- libraries that would keep random state ---- */

/* BoringSSL (Chromium, gRPC, Envoy) keeps a generator in the process if the kernel wipes a page of it in
 * each child, which tells it of fork(). No page tells it of the fork of a machine. Refused that page, as
 * by older kernels, it asks the kernel for every number. */
void refuse_wiped_pages(void)
{
    struct sock_filter steps[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, AUDIT_ARCH_X86_64, 0, 5),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_madvise, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[2])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, MADV_WIPEONFORK, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EINVAL),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {.len = COUNT(steps), .filter = steps};
    /* Without the flag, kernels before 5.16 would slow down all programs. One without seccomp has no such filter. */
    if (syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_SPEC_ALLOW, &program) < 0)
        say("random numbers of BoringSSL: %s", strerror(errno));
}

/* ---- processes whose generators the forks of this machine would share ---- */

enum { OPENSSL = 1, SAFE_OPENSSL = 2, GNUTLS = 4, NSS = 8, V8 = 16, JAVA = 32, NUMPY = 64, PYTHON = 128, RUBY = 256, PHP = 512, GO = 1024, NODE = 2048 };

static const struct {
    const char *prefix; /* of the name of a mapped file; _rust.abi3.so is that of Python's cryptography */
    unsigned means;
} signs[] = {
    {"libcrypto", OPENSSL}, {"_rust.abi3.so", OPENSSL}, {"openssl-random.so", SAFE_OPENSSL}, {"libgnutls", GNUTLS}, {"libsoftokn", NSS},
    {"libnode.so", V8 | NODE}, {"libv8.so", V8}, {"libjvm.so", JAVA}, {"mtrand.", NUMPY}, {"libpython", PYTHON}, {"libruby", RUBY}, {"libphp", PHP},
};
static const struct {
    const char *prefix; /* of the name of the program */
    unsigned means;
} programs[] = {
    {"node", V8 | NODE | OPENSSL}, {"chrom", V8}, {"python", PYTHON}, {"ruby", RUBY}, {"php", PHP},
};
static const struct {
    unsigned means;
    const char *name;
} generators[] = {
    {OPENSSL, "openssl"}, {GNUTLS, "gnutls"}, {NSS, "nss"}, {NODE, "crypto.randomUUID"}, {V8, "Math.random"}, {JAVA, "java.util.Random"}, {NUMPY, "numpy.random"},
    {PYTHON, "random of Python"}, {RUBY, "rand of Ruby"}, {PHP, "mt_rand"}, {GO, "math/rand of Go"},
};

static bool begins(const char *text, const char *prefix)
{
    return strncmp(text, prefix, strlen(prefix)) == 0;
}

static unsigned mapped(const char *process)
{
    char path[32];
    snprintf(path, sizeof path, "/proc/%.10s/maps", process);
    FILE *maps = fopen(path, "re");
    unsigned found = 0;
    char *line = NULL;
    size_t capacity = 0;
    while (maps && getline(&line, &capacity, maps) > 0) {
        const char *name = strrchr(line, '/');
        for (size_t n = 0; name && n < COUNT(signs); n++)
            found |= begins(name + 1, signs[n].prefix) ? signs[n].means : 0;
    }
    free(line);
    if (maps)
        fclose(maps);
    return found;
}

/* Go's linker puts this note into the first page of each program. */
static bool is_go(const char *program)
{
    static const char note[] = {4, 0, 0, 0, 'G', 'o', 0, 0};
    char head[PAGE];
    int fd = open(program, O_RDONLY | O_CLOEXEC);
    ssize_t size = fd < 0 ? -1 : read(fd, head, sizeof head);
    if (fd >= 0)
        close(fd);
    return size > 0 && memmem(head, (size_t)size, note, sizeof note);
}

/* Whether the process was started with the script that turns off the pool of randomUUID. */
static bool has_node_script(const char *process)
{
    char path[32];
    size_t size = 0;
    snprintf(path, sizeof path, "/proc/%.10s/environ", process);
    char *environment = load_file(path, &size);
    static const char script[] = PLACE "node-random.js";
    bool found = environment && memmem(environment, size, script, sizeof script - 1);
    free(environment);
    return found;
}

static unsigned generators_of(const char *process, const char *name)
{
    char path[32];
    snprintf(path, sizeof path, "/proc/%.10s/exe", process);
    unsigned found = mapped(process);
    for (size_t n = 0; n < COUNT(programs); n++)
        found |= begins(name, programs[n].prefix) ? programs[n].means : 0;
    if (is_go(path))
        found |= GO;
    if (found & NODE && has_node_script(process))
        found &= ~(unsigned)NODE;
    return found & SAFE_OPENSSL ? found & ~(unsigned)(OPENSSL | SAFE_OPENSSL) : found;
}

/* The processes of one program that have the same generators: those of a server are many. */
struct group {
    char name[61], pid[11]; /* of the first one */
    unsigned found;
    int processes;
};

static void describe(struct reply *r, const struct group *g)
{
    char line[LINE_SIZE];
    int size = snprintf(line, sizeof line, "%s (", g->name);
    if (g->processes > 1)
        size += snprintf(line + size, sizeof line - (size_t)size, "%d processes, ", g->processes);
    size += snprintf(line + size, sizeof line - (size_t)size, "pid %s%s):", g->pid, g->processes > 1 ? " ..." : "");
    const char *comma = "";
    for (size_t n = 0; n < COUNT(generators) && size < (int)sizeof line; n++) {
        if (g->found & generators[n].means) {
            size += snprintf(line + size, sizeof line - (size_t)size, "%s %s", comma, generators[n].name);
            comma = ",";
        }
    }
    reply_text(r, 1, line);
}

/* False: there are too many groups. */
static bool count_in(struct group *groups, const char *process, const char *name, unsigned found)
{
    struct group *g = groups;
    while (g < groups + GROUPS_MAX && g->processes && (g->found != found || strncmp(g->name, name, sizeof g->name - 1) != 0))
        g++;
    if (g == groups + GROUPS_MAX)
        return false;
    if (g->processes++ == 0) {
        snprintf(g->name, sizeof g->name, "%.60s", name);
        snprintf(g->pid, sizeof g->pid, "%.10s", process);
        g->found = found;
    }
    return true;
}

int shared_random(struct reply *r)
{
    struct group groups[GROUPS_MAX] = {0};
    bool complete = true;
    DIR *processes = opendir("/proc");
    struct dirent *entry;
    while (processes && (errno = 0, entry = readdir(processes)) != NULL) {
        char path[32], program[PATH_MAX] = "";
        snprintf(path, sizeof path, "/proc/%.10s/exe", entry->d_name);
        if (!isdigit((unsigned char)entry->d_name[0]) || readlink(path, program, sizeof program - 1) <= 0)
            continue; /* no process, a thread of the kernel, or it has ended */
        const char *name = strrchr(program, '/') ? strrchr(program, '/') + 1 : program;
        unsigned found = generators_of(entry->d_name, name);
        if (found)
            complete &= count_in(groups, entry->d_name, name, found);
    }
    int error = errno;
    if (processes)
        closedir(processes);
    for (const struct group *g = groups; g < groups + GROUPS_MAX && g->processes; g++)
        describe(r, g);
    if (!complete)
        reply_text(r, 1, "processes of more programs");
    return error;
}
