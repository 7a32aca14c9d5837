/* Start a process: environment, user, terminal, program. */
#define _GNU_SOURCE
#include "spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

bool strings_add(struct strings *s, char *item)
{
    if (s->count + 2 > s->capacity) {
        size_t capacity = s->capacity ? s->capacity * 2 : 64;
        char **grown = realloc(s->items, capacity * sizeof *grown);
        if (!grown)
            return false;
        s->items = grown;
        s->capacity = capacity;
    }
    s->items[s->count++] = item;
    s->items[s->count] = NULL;
    return true;
}

void strings_free(struct strings *s)
{
    free(s->items);
    *s = (struct strings){0};
}

void strings_free_all(struct strings *s)
{
    for (size_t i = 0; i < s->count; i++)
        free(s->items[i]);
    strings_free(s);
}

static size_t name_size(const char *assignment)
{
    const char *equals = strchr(assignment, '=');
    return equals ? (size_t)(equals - assignment) : 0;
}

bool env_set(struct strings *env, char *assignment)
{
    size_t size = name_size(assignment);
    if (size == 0)
        return false;
    for (size_t i = 0; i < env->count; i++) {
        if (strncmp(env->items[i], assignment, size + 1) == 0) {
            env->items[i] = assignment;
            return true;
        }
    }
    return strings_add(env, assignment);
}

const char *env_get(const struct strings *env, const char *name)
{
    size_t size = strlen(name);
    for (size_t i = 0; i < env->count; i++) {
        if (strncmp(env->items[i], name, size) == 0 && env->items[i][size] == '=')
            return env->items[i] + size + 1;
    }
    return NULL;
}

bool env_defaults(struct strings *env, const struct account *a, const char *term, struct strings *made)
{
    /* Without them, forks would share the random numbers of OpenSSL and Node.js. */
    bool random = access("/run/coppice/node-random.js", F_OK) == 0;
    const char *defaults[][2] = {
        {"PATH", DEFAULT_PATH}, {"HOME", a->home}, {"USER", a->name}, {"LOGNAME", a->name}, {"SHELL", a->shell}, {"TERM", term},
        {"OPENSSL_CONF", random ? "/run/coppice/openssl.cnf" : NULL}, {"NODE_OPTIONS", random ? "--require=/run/coppice/node-random.js" : NULL},
    };
    for (size_t i = 0; i < sizeof defaults / sizeof *defaults; i++) {
        const char *value = defaults[i][1];
        if (!value || !*value || env_get(env, defaults[i][0]))
            continue;
        char *assignment;
        if (asprintf(&assignment, "%s=%s", defaults[i][0], value) < 0)
            return false;
        if (!strings_add(made, assignment)) {
            free(assignment);
            return false;
        }
        if (!strings_add(env, assignment))
            return false;
    }
    return true;
}

/* Like execvp, but with the PATH of the new environment, and without running other files in a
 * shell. */
static int execute(char **argv, char **env)
{
    if (strchr(argv[0], '/')) {
        execve(argv[0], argv, env);
        return errno;
    }
    const char *path = DEFAULT_PATH;
    for (char **e = env; *e; e++) {
        if (strncmp(*e, "PATH=", 5) == 0)
            path = *e + 5;
    }
    int error = ENOENT;
    char candidate[PATH_MAX];
    for (const char *at = path;; at++) {
        size_t size = strcspn(at, ":");
        int written = snprintf(candidate, sizeof candidate, "%.*s/%s", size ? (int)size : 1, size ? at : ".", argv[0]);
        if (*argv[0] && written > 0 && written < (int)sizeof candidate) {
            if (access(candidate, F_OK) == 0) /* much cheaper than a failing execve */
                execve(candidate, argv, env);
            if (errno == EACCES)
                error = EACCES;
            else if (errno != ENOENT && errno != ENOTDIR)
                return errno;
        }
        at += size;
        if (!*at)
            return error;
    }
}

static int become(const struct account *a)
{
    if (geteuid() != 0 && a->uid == geteuid())
        return 0;
    /* From root to root there is nothing to change: neither side has supplementary groups. */
    if (geteuid() == 0 && getegid() == 0 && a->uid == 0 && a->gid == 0 && a->group_count == 0 && getgroups(0, NULL) == 0)
        return 0;
    /* Bare system calls: the C library's wrappers would signal threads of the parent, whose memory
     * this is. */
    if (syscall(SYS_setgroups, a->group_count, a->groups) < 0 || syscall(SYS_setresgid, a->gid, a->gid, a->gid) < 0 ||
        syscall(SYS_setresuid, a->uid, a->uid, a->uid) < 0)
        return errno;
    return 0;
}

#define TRY(what, expression)                                                                                                      \
    do {                                                                                                                           \
        if ((expression) < 0) {                                                                                                    \
            s->failed = what;                                                                                                      \
            s->error = errno;                                                                                                      \
            _exit(127);                                                                                                            \
        }                                                                                                                          \
    } while (0)

rlim_t spawn_files;

static int enter_group(const char *group)
{
    char path[96];
    snprintf(path, sizeof path, "%s/cgroup.procs", group);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    return fd < 0 || write(fd, "0", 1) < 0 ? -1 : 0;
}

static void limit_files(void)
{
    struct rlimit files;
    if (spawn_files && getrlimit(RLIMIT_NOFILE, &files) == 0) {
        files.rlim_cur = spawn_files;
        setrlimit(RLIMIT_NOFILE, &files);
    }
}

/* Runs in the parent's memory until the exec, so it writes only to `*s`. */
static _Noreturn void child(struct spawn *s)
{
    TRY("setsid", setsid());
    TRY("standard input", dup2(s->in, STDIN_FILENO));
    TRY("standard output", dup2(s->out, STDOUT_FILENO));
    TRY("standard error", dup2(s->err, STDERR_FILENO));
    if (s->tty)
        TRY("terminal", ioctl(STDIN_FILENO, TIOCSCTTY, 0));
    if (s->group && !s->inside)
        TRY("cgroup", enter_group(s->group));
    limit_files();
    s->error = become(s->account);
    if (s->error) {
        s->failed = "user";
        _exit(127);
    }
    if (chdir(s->cwd) < 0) {
        if (!s->cwd_optional)
            TRY("working directory", -1);
        TRY("working directory", chdir("/"));
    }
    umask(022);
    struct sigaction normal = {.sa_handler = SIG_DFL};
    sigaction(SIGPIPE, &normal, NULL);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    s->error = execute(s->argv, s->env);
    s->failed = s->argv[0];
    _exit(127);
}

/* Like vfork, but the child begins in its control group. To move it there takes a lock for which
 * the kernel waits 10 ms if tasks can be preempted (percpu_down_write in its cgroup_attach_lock).
 * -1 with an errno: kernels before 5.7. */
static pid_t start_inside(struct spawn *s)
{
    _Alignas(16) char stack[32 << 10]; /* the parent's own, which stands still meanwhile */
    int group = open(s->group, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (group < 0)
        return -1;
    struct clone_args how = {
        .flags = CLONE_VM | CLONE_VFORK | CLONE_INTO_CGROUP, .exit_signal = SIGCHLD, .stack = (uintptr_t)stack, .stack_size = sizeof stack, .cgroup = (uint64_t)group};
    long result;
    s->inside = true;
    __asm__ volatile("syscall\n\t"
                     "test %%rax, %%rax\n\t"
                     "jnz 1f\n\t"
                     "mov %[s], %%rdi\n\t"
                     "call *%[child]\n\t"
                     "1:"
                     : "=a"(result)
                     : "a"(SYS_clone3), "D"(&how), "S"(sizeof how), [s] "r"(s), [child] "r"(child)
                     : "rcx", "r11", "memory");
    close(group);
    s->inside = result > 0;
    errno = result < 0 ? (int)-result : 0;
    return result < 0 ? -1 : (pid_t)result;
}

pid_t spawn(struct spawn *s)
{
    s->error = 0;
    s->failed = NULL;
    pid_t pid = s->group ? start_inside(s) : -1;
    if (pid < 0) {
        /* vfork: a fork would copy page tables and then pages needlessly, in every fork of the machine. */
        pid = vfork();
        if (pid == 0)
            child(s);
    }
    if (pid < 0) {
        s->error = errno;
        s->failed = "fork";
        return -1;
    }
    if (s->error == 0)
        return pid;
    while (waitpid(pid, NULL, 0) < 0 && errno == EINTR) {
    }
    return -1;
}

int pidfd_of(pid_t pid)
{
    return (int)syscall(SYS_pidfd_open, pid, 0); /* close-on-exec by default */
}

int exit_code_of(int status)
{
    return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
}
