/* IDENTITY: one message makes this machine itself. Any step that fails fails the message: a machine that is half itself is not used. */
#define _GNU_SOURCE
#include "agent.h"

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
#define DNS_MAX 8
#define NOTHING_TO_DO (-1)
#define HEX "0123456789abcdef"

enum { END_SESSIONS = 1, THAW_FIRST = 2, START_PROCESS = 4, NEW_MACHINE = 8 };

static const char hook[] = "/etc/coppice/on-fork", payload_path[] = "/run/coppice/payload";

struct identity {
    uint64_t serial, clock_ns, flags;
    const uint8_t *entropy, *payload;
    size_t entropy_size, payload_size;
    const char *hostname, *machine_id, *boot_id, *dns[DNS_MAX];
    size_t dns_count;
    struct network network;
    struct strings argv, env;
    const char *cwd, *user;
    struct volume volumes[VOLUMES_MAX];
    size_t volume_count;
    char said[200]; /* by the step that failed, where strerror would not do */
};

/* ---- the message ---- */

static bool is_name(const char *text, const char *alphabet, size_t shortest, size_t longest)
{
    size_t size = strlen(text);
    return size >= shortest && size <= longest && strspn(text, alphabet) == size;
}

/* Its number, whether it is read-only, its path. */
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
    case 10:
        if (i->dns_count < DNS_MAX)
            i->dns[i->dns_count++] = tlv_text(t);
        break;
    case 11: i->payload = t->value; i->payload_size = t->size; break;
    case 12: i->flags = tlv_int(t); break;
    case 13: i->network.mtu = (uint32_t)tlv_int(t); break;
    case 20: t->bad |= !strings_add(&i->argv, tlv_text(t)); break;
    case 21: t->bad |= !env_set(&i->env, tlv_text(t)); break;
    case 22: i->cwd = tlv_text(t); break;
    case 23: i->user = tlv_text(t); break;
    case 24: take_volume(i, t); break;
    }
}

static bool parse(struct identity *i, const struct frame *f)
{
    struct tlv t = tlv_read(f);
    while (tlv_next(&t))
        take_field(i, &t);
    for (size_t n = 0; n < i->dns_count; n++) {
        struct in6_addr address;
        if (inet_pton(AF_INET, i->dns[n], &address) != 1 && inet_pton(AF_INET6, i->dns[n], &address) != 1)
            return false;
    }
    return !t.bad && i->entropy_size >= ENTROPY_MIN && i->entropy_size <= 4096 &&
           (!i->hostname || is_name(i->hostname, HEX "ghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ-.", 1, 64)) &&
           (!i->machine_id || is_name(i->machine_id, HEX, 32, 32)) && (!i->boot_id || is_name(i->boot_id, HEX "-", 36, 36));
}

/* Run a program of the image as root, with what it says on the console. */
static int run_and_wait(struct identity *i, char **argv, char **env, int timeout_ms)
{
    static const struct account root = {.name = "root", .home = "/root", .shell = "/bin/sh"};
    int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    struct spawn s = {
        .argv = argv, .env = env, .cwd = "/", .account = &root, .in = null, .out = STDERR_FILENO, .err = STDERR_FILENO,
    };
    pid_t pid = spawn(&s);
    close(null);
    if (pid < 0)
        return s.error;
    struct pollfd ended = {.fd = pidfd_of(pid), .events = POLLIN};
    int error = poll(&ended, 1, timeout_ms) == 1 ? 0 : ETIMEDOUT, status = 0;
    if (error)
        kill(-pid, SIGKILL);
    close(ended.fd);
    while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
    }
    if (!error && exit_code_of(status) != 0) {
        snprintf(i->said, sizeof i->said, "%s ended with exit code %d", argv[0], exit_code_of(status));
        error = ECANCELED;
    }
    return error;
}

/* ---- the steps, in their order ---- */

static int step_thaw(struct machine *m, struct identity *i)
{
    return i->flags & THAW_FIRST ? thaw(m) : NOTHING_TO_DO;
}

static int step_clock(struct machine *m, struct identity *i)
{
    (void)m;
    if (!i->clock_ns)
        return NOTHING_TO_DO;
    struct timespec t = {.tv_sec = (time_t)(i->clock_ns / 1000000000), .tv_nsec = (long)(i->clock_ns % 1000000000)};
    return clock_settime(CLOCK_REALTIME, &t) < 0 ? errno : 0;
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
    int error = remove_file("/var/lib/systemd/random-seed");
    return error ? error : remove_file("/var/lib/urandom/random-seed");
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
        return NOTHING_TO_DO;
    int error = 0;
    bool found = false;
    struct dirent *entry;
    while (!error && (entry = readdir(directory)) != NULL) {
        if (is_host_key(entry->d_name)) {
            found = true;
            error = unlinkat(dirfd(directory), entry->d_name, 0) < 0 ? errno : 0;
        }
    }
    closedir(directory);
    if (error || !found)
        return error ? error : NOTHING_TO_DO;
    char *argv[] = {"/usr/bin/ssh-keygen", "-A", NULL}, *env[] = {"PATH=" DEFAULT_PATH, "HOME=/root", NULL};
    return access(argv[0], X_OK) < 0 ? 0 : run_and_wait(i, argv, env, KEYGEN_MS);
}

static int step_network(struct machine *m, struct identity *i)
{
    (void)m;
    if (!i->network.mac && !i->network.address && !i->network.gateway && !i->network.mtu && !i->dns_count)
        return NOTHING_TO_DO;
    int error = 0;
    if (i->network.mac || i->network.address || i->network.gateway || i->network.mtu)
        error = network_set(&i->network);
    char text[DNS_MAX * (INET6_ADDRSTRLEN + 16)];
    size_t size = 0;
    for (size_t n = 0; n < i->dns_count; n++)
        size += (size_t)snprintf(text + size, sizeof text - size, "nameserver %s\n", i->dns[n]);
    return error || !size ? error : put_file("/etc/resolv.conf", text, size, 0644);
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
            snprintf(i->said, sizeof i->said, "%.150s: %s", i->volumes[n].path, strerror(error));
            free(path);
            return error;
        }
        m->mounted[m->mounted_count++] = path;
    }
    return 0;
}

static int step_payload(struct machine *m, struct identity *i)
{
    (void)m;
    int error = i->payload || i->flags & NEW_MACHINE ? remove_file(payload_path) : 0; /* the source's is not ours */
    if (!i->payload)
        return error ? error : NOTHING_TO_DO;
    return error ? error : put_file(payload_path, (const char *)i->payload, i->payload_size, 0600);
}

/* The hook tells what runs already that it is another machine now. Where the process is only being started, there is nobody to tell. */
static int step_hook(struct machine *m, struct identity *i)
{
    (void)m;
    /* Looked for in any case: the boot's answer is in the kernel's cache of names then, and its forks need not ask two file systems. */
    bool none = faccessat(AT_FDCWD, hook, X_OK, AT_EACCESS) < 0; /* not access: it takes other credentials for the time */
    if (!(i->flags & NEW_MACHINE) || i->flags & START_PROCESS || none)
        return NOTHING_TO_DO;
    char *argv[] = {(char *)hook, NULL};
    char *env[] = {"PATH=" DEFAULT_PATH, "HOME=/root", i->payload ? "COPPICE_PAYLOAD=/run/coppice/payload" : NULL, NULL};
    return run_and_wait(i, argv, env, HOOK_MS);
}

static int step_sessions(struct machine *m, struct identity *i)
{
    if (!(i->flags & END_SESSIONS))
        return NOTHING_TO_DO;
    /* Idle workers are not woken: each page that they touch would be a page of this fork's own. */
    for (int n = 1; n < PORT_COUNT; n++) {
        if (m->workers[n] && m->shared->active[n])
            kill(m->workers[n], SIGUSR1);
    }
    return 0;
}

static int step_image(struct machine *m, struct identity *i)
{
    struct shared *shared = m->shared;
    if (!i->cwd && !i->user && i->env.count == 0)
        return NOTHING_TO_DO;
    if ((i->cwd && strlen(i->cwd) >= sizeof shared->cwd) || (i->user && strlen(i->user) >= sizeof shared->user))
        return ENAMETOOLONG;
    strcpy(shared->cwd, i->cwd ? i->cwd : "");
    strcpy(shared->user, i->user ? i->user : "");
    size_t size = 0;
    for (size_t n = 0; n < i->env.count; n++) {
        size_t length = strlen(i->env.items[n]) + 1;
        if (length > sizeof shared->env - size)
            return E2BIG;
        memcpy(shared->env + size, i->env.items[n], length);
        size += length;
    }
    shared->env_size = (uint32_t)size;
    return 0;
}

static int step_process(struct machine *m, struct identity *i)
{
    if (!(i->flags & START_PROCESS) || i->argv.count == 0)
        return NOTHING_TO_DO;
    if (m->process > 0 && !m->process_ended)
        return EBUSY;
    struct account account;
    int error = account_find(m->shared->user, &account);
    if (error) {
        snprintf(i->said, sizeof i->said, "user %.100s: %s", m->shared->user, strerror(error));
        return error;
    }
    char defaults[6][320];
    if (!env_defaults(&i->env, &account, NULL, defaults))
        return ENOMEM;
    if (fchown(STDERR_FILENO, account.uid, (gid_t)-1) < 0) /* for a process that opens /dev/stdout anew */
        say("the console keeps its owner: %s", strerror(errno));
    int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    struct spawn s = {
        .argv = i->argv.items, .env = i->env.items, .cwd = *m->shared->cwd ? m->shared->cwd : "/", .account = &account,
        .in = null, .out = STDERR_FILENO, .err = STDERR_FILENO,
    };
    pid_t pid = spawn(&s);
    close(null);
    if (pid < 0) {
        snprintf(i->said, sizeof i->said, "%.100s: %s", s.failed, strerror(s.error));
        return s.error;
    }
    m->process = pid;
    m->process_ended = false;
    return 0;
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

bool identity(struct machine *m, const struct frame *f)
{
    struct identity i = {0};
    struct reply done = {0}, problem = {0};
    const char *failed = "message";
    int error = !parse(&i, f) ? EINVAL : i.serial <= m->serial ? ESTALE : 0;
    if (!error) {
        m->serial = i.serial; /* also where a step fails: this message is spent */
        reply_int(&done, 1, i.serial);
        error = take_steps(m, &i, &done, &failed);
    }
    free(i.argv.items);
    free(i.env.items);
    if (!error)
        return wire_put(&m->wire, OK, done.data, done.size);
    char text[300];
    snprintf(text, sizeof text, "%s: %s", failed, i.said[0] ? i.said : strerror(error));
    reply_int(&problem, 1, (uint64_t)error);
    reply_text(&problem, 2, text);
    return wire_put(&m->wire, ERROR, problem.data, problem.size);
}
