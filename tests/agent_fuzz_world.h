/* The world of the agent's fuzz: a clock that jumps, and processes without processes. In most inputs
 * a command or helper is a row of a table in this process, which costs nothing; in the others it is
 * real. */
#include <linux/random.h>
#include <poll.h>
#include <stdarg.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>

static bool real_processes;
static int64_t skipped_ms;
static bool idle;

/* ---- the clock ---- */

int clock_gettime(clockid_t id, struct timespec *t)
{
    int result = (int)syscall(SYS_clock_gettime, id, t);
    if (id == CLOCK_MONOTONIC) {
        int64_t ns = t->tv_nsec + skipped_ms % 1000 * 1000000;
        t->tv_sec += skipped_ms / 1000 + ns / 1000000000;
        t->tv_nsec = ns % 1000000000;
    }
    return result;
}

int nanosleep(const struct timespec *wanted, struct timespec *left)
{
    (void)left;
    skipped_ms += wanted->tv_sec * 1000 + wanted->tv_nsec / 1000000;
    return 0;
}

int poll(struct pollfd *fds, nfds_t count, int timeout)
{
    struct timespec none = {0}, some = {.tv_nsec = 1000000};
    int ready = (int)syscall(SYS_ppoll, fds, count, &none, NULL, 0);
    idle = ready == 0;
    if (ready == 0 && timeout != 0 && real_processes && jobs_alive())
        ready = (int)syscall(SYS_ppoll, fds, count, &some, NULL, 0);
    if (ready == 0 && timeout > 0)
        skipped_ms += timeout;
    return ready;
}

/* ---- what must not reach the kernel ---- */

int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (request == RNDADDENTROPY || request == _IO('R', 0x07))
        return 0;
    return (int)syscall(SYS_ioctl, fd, request, argument);
}

void sync(void)
{
}

void ignored_power_off(struct machine *m, struct wire *answered, uint64_t grace_ms)
{
    (void)m, (void)answered, (void)grace_ms;
}

/* ---- processes ---- */

#define FAKES_MAX 256
#define FIRST_FAKE 1000000

enum behaviour { COPIES, WRITES, WAITS, ENDS, BEHAVIOURS };

static struct fake {
    pid_t pid; /* 0: free */
    enum behaviour behaviour;
    bool helper, stubborn;
    int in, out, err, status;
    bool ended;
    unsigned left;
} fakes[FAKES_MAX];

static pid_t last_fake;
static int last_pipes[3][2];

static pid_t fake_start(bool helper, int in, int out, int err)
{
    for (struct fake *f = fakes; f < fakes + FAKES_MAX; f++) {
        if (f->pid)
            continue;
        *f = (struct fake){.pid = FIRST_FAKE + last_fake++ % FIRST_FAKE, .helper = helper, .behaviour = number_below(BEHAVIOURS), .stubborn = one_in(4), .left = (unsigned)number_below(1000000)};
        f->in = fcntl(in, F_DUPFD_CLOEXEC, 3);
        f->out = fcntl(out, F_DUPFD_CLOEXEC, 3);
        f->err = fcntl(err, F_DUPFD_CLOEXEC, 3);
        fcntl(f->in, F_SETFL, O_RDWR | O_NONBLOCK);
        fcntl(f->out, F_SETFL, O_RDWR | O_NONBLOCK);
        return f->pid;
    }
    errno = EAGAIN;
    return -1;
}

static void fake_end(struct fake *f, int status)
{
    static const uint8_t ok[] = {OK};
    if (f->helper && status == 0 && !one_in(8) && write(f->err, ok, sizeof ok) < 0)
        status = SIGKILL;
    shut(&f->in);
    shut(&f->out);
    shut(&f->err);
    f->status = status;
    f->ended = true;
}

/* One step of each. Return whether one has ended. */
static void fakes_run(void)
{
    static char data[8192];
    for (struct fake *f = fakes; f < fakes + FAKES_MAX; f++) {
        if (!f->pid || f->ended)
            continue;
        ssize_t n = -1;
        if (f->behaviour == COPIES && (n = read(f->in, data, sizeof data)) == 0)
            fake_end(f, 0);
        else if (f->behaviour == WRITES)
            n = (ssize_t)(f->left < sizeof data ? f->left : number_below(sizeof data));
        else if (f->behaviour == ENDS)
            fake_end(f, (int)number_below(256) << 8);
        if (n <= 0 || f->ended)
            continue;
        ssize_t written = write(one_in(8) && !f->helper ? f->err : f->out, data, (size_t)n);
        f->left -= written > 0 ? (unsigned)written : 0;
        if ((written < 0 && errno != EAGAIN) || f->left == 0)
            fake_end(f, 0);
    }
}

static struct fake *fake_find(pid_t pid)
{
    for (struct fake *f = fakes; f < fakes + FAKES_MAX; f++) {
        if (f->pid == pid && pid)
            return f;
    }
    return NULL;
}

static void fake_signal(pid_t pid, int signal)
{
    struct fake *f = fake_find(pid);
    if (f && !f->ended && (signal == SIGKILL || (!f->stubborn && signal != SIGCONT && signal != SIGCHLD)))
        fake_end(f, signal);
}

int kill(pid_t pid, int signal)
{
    if (pid == -1 || pid < -2 * FIRST_FAKE || (pid < FIRST_FAKE && pid > -FIRST_FAKE))
        return (int)syscall(SYS_kill, pid, signal);
    fake_signal(pid < 0 ? -pid : pid, signal);
    return 0;
}

int pipe2(int pair[2], int flags)
{
    int result = (int)syscall(SYS_pipe2, pair, flags);
    memmove(last_pipes, last_pipes[1], sizeof last_pipes - sizeof *last_pipes);
    memcpy(last_pipes[2], pair, sizeof *last_pipes);
    return result;
}

/* Of a helper, whose three pipes were opened just before. */
pid_t fork(void)
{
    return real_processes ? (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0) : fake_start(true, last_pipes[0][0], last_pipes[1][1], last_pipes[2][1]);
}

pid_t __real_spawn(struct spawn *s);

pid_t __wrap_spawn(struct spawn *s)
{
    if (real_processes)
        return __real_spawn(s);
    s->error = one_in(8) ? ENOENT : 0;
    s->failed = s->argv[0];
    return s->error ? -1 : fake_start(false, s->in, s->out, s->err);
}

void __real_group_kill(const struct job *j, int signal);

void __wrap_group_kill(const struct job *j, int signal)
{
    if (real_processes)
        __real_group_kill(j, signal);
    else if (j->pid)
        kill(j->pid, signal);
}
