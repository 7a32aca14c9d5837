/* A fuzz of the guest agent: the real loop, decoder, streams, jobs and helpers, fed with mutated
 * sessions of hosts in this process. tests/agent_fuzzing.py prepares its sandbox.
 *
 *   agent-fuzz ROOT CORPUS FIRST COUNT    play COUNT inputs, from the seed FIRST on, in ROOT
 *
 * The clock jumps over waits, so that time limits pass at once. After each input nothing may be left:
 * no job, process, descriptor or memory. */
#define _GNU_SOURCE
#define jobs_reaped checked_reaped
#define power_off ignored_power_off
#include "control.c"
#undef jobs_reaped

#include <arpa/inet.h>
#include <fcntl.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>

#include "self.h"

/* GCC has these, but not always their headers. */
size_t __sanitizer_get_current_allocated_bytes(void);
void __sanitizer_set_report_fd(void *fd);
void __sanitizer_set_death_callback(void (*callback)(void));

#define HANG_S 300     /* asleep: this host may be busy */
#define HANG_CPU_S 20 /* at work */
#define WIRES 2
#define REAL_ONE_IN 64

static unsigned long current; /* the seed of the present input */
static int report = 2;

static _Noreturn void failed(const char *what)
{
    dprintf(report, "input %lu: %s\n", current, what);
    abort();
}

static void tell(void)
{
    dprintf(report, "input %lu: the sanitizer's report is above\n", current);
}

static void hung(int signal)
{
    (void)signal;
    failed("hangs");
}

/* ---- random numbers ---- */

static uint64_t state;

static uint64_t number_below(uint64_t limit) /* splitmix64 */
{
    uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return (z ^ (z >> 31)) % limit;
}

static bool one_in(uint64_t n)
{
    return number_below(n) == 0;
}

static uint64_t interesting(void)
{
    static const uint64_t values[] = {0, 1, 2, 3, 4, 7, 8, 64, 65, 255, 4090, 16384, 32768, 65535, 65536, 262144, 1u << 22, INT32_MAX,
                                      UINT32_MAX, 1ull << 32, INT64_MAX, UINT64_MAX};
    return one_in(3) ? number_below(UINT64_MAX) : values[number_below(sizeof values / sizeof *values)];
}

#include "agent_fuzz_input.h"
#include "agent_fuzz_world.h"

static struct machine machine;
static struct polls polls;

/* ---- processes ---- */

bool jobs_reaped(pid_t pid, int status);

bool checked_reaped(pid_t pid, int status)
{
    for (struct job *j = job_first(); j; j = j->next) {
        if (j->pid == pid && j->kind == HELPER && WIFSIGNALED(status) && WTERMSIG(status) != SIGKILL && WTERMSIG(status) != SIGTERM)
            failed("a helper crashed");
    }
    return jobs_reaped(pid, status);
}

static void reap_fakes(void)
{
    for (struct fake *f = fakes; f < fakes + FAKES_MAX; f++) {
        if (f->pid && f->ended) {
            pid_t pid = f->pid;
            f->pid = 0;
            checked_reaped(pid, f->status);
        }
    }
}

/* ---- servers in the guest, for CONNECT ---- */

static int listeners[2], accepted[8];

static int listening(const void *address, socklen_t size, int family)
{
    int fd = socket(family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0 || bind(fd, address, size) < 0 || listen(fd, 8) < 0)
        failed("no server can listen");
    return fd;
}

static void echo(void)
{
    char data[4096];
    for (size_t i = 0; i < sizeof accepted / sizeof *accepted; i++) {
        if (accepted[i] < 0) {
            if (one_in(8))
                accepted[i] = accept4(listeners[i % 2], NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
            continue;
        }
        ssize_t n = read(accepted[i], data, sizeof data);
        if (n == 0 || (n > 0 && write(accepted[i], data, (size_t)n) < 0) || (n < 0 && errno != EAGAIN) || one_in(64))
            shut(&accepted[i]);
    }
}

/* ---- playing ---- */

static void turn(void)
{
    for (size_t i = 0; i < machine.wire_count; i++)
        take_frames(&machine, &machine.wires[i]);
    jobs_step();
    for (size_t i = 0; i < machine.wire_count; i++)
        wire_flush(&machine.wires[i]);
    wait_for_events(&machine, &polls);
    if (machine.thaw_at && now_ms() >= machine.thaw_at)
        thaw(&machine);
}

/* End everything that the input has left, as the death of the machine does. */
static void clean_up(int hosts[WIRES])
{
    for (int i = 0; i < WIRES; i++)
        shut(&hosts[i]);
    for (size_t i = 0; i < sizeof accepted / sizeof *accepted; i++)
        shut(&accepted[i]);
    for (int fd; (fd = accept4(listeners[0], NULL, NULL, SOCK_NONBLOCK)) >= 0 || (fd = accept4(listeners[1], NULL, NULL, SOCK_NONBLOCK)) >= 0;)
        close(fd);
    if (real_processes)
        kill(-1, SIGKILL); /* all processes of this namespace but the first and this one */
    for (struct fake *f = fakes; f < fakes + FAKES_MAX; f++) {
        if (f->pid && !f->ended)
            fake_end(f, SIGKILL);
    }
    while (reap_fakes(), jobs_alive())
        reap(&machine);
    while (real_processes && waitpid(-1, NULL, 0) > 0) {
    }
    for (struct job *j; (j = job_first());)
        job_free(j);
    for (size_t i = 0; i < WIRES; i++) {
        shut(&machine.wires[i].fd);
        shut(&machine.wires[i].epoll);
        free(machine.wires[i].parts);
    }
    for (size_t i = 0; i < machine.mounted_count; i++)
        free(machine.mounted[i]);
    free(polls.fds);
    polls = (struct polls){0};
}

static void play(void)
{
    int hosts[WIRES];
    real_processes = one_in(REAL_ONE_IN);
    bool is_port = one_in(4);
    uint64_t quick = one_in(8);
    machine.mounted_count = 0;
    machine.serial = 0;
    machine.thaw_at = 0;
    machine.image.env_size = 0;
    *machine.image.cwd = *machine.image.user = 0;
    for (int i = 0; i < WIRES; i++) {
        int pair[2];
        if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair) < 0)
            failed("there is no socket");
        hosts[i] = pair[0];
        machine.wires[i] = (struct wire){0};
        if (!wire_open(&machine.wires[i], pair[1], -1, is_port))
            failed("the wire cannot be opened");
        make_input(&inputs[i]);
        if (i > 0 && !one_in(4))
            inputs[i].size = 0; /* most inputs have one host */
    }
    int left = 10 + (int)number_below(40);
    for (bool sent = false; left > 0; left -= sent ? 1 + 4 * (int)quick : 0) {
        sent = true;
        for (int i = 0; i < WIRES; i++) {
            sent &= send_some(&inputs[i], hosts[i]);
            if (!one_in(3))
                receive(&inputs[i], hosts[i]);
        }
        turn();
        fakes_run();
        reap_fakes();
        echo();
        if (sent && idle && one_in(2))
            break;
    }
    clean_up(hosts);
}

/* ---- the program ---- */

/* /proc is still that of the outer namespace, and tells the ids of both. */
static bool in_namespace(void)
{
    size_t size;
    int outer = 0, inner = 0;
    char *status = load_file("/proc/self/status", &size);
    const char *ids = status ? strstr(status, "NSpid:") : NULL;
    bool good = ids && sscanf(ids, "NSpid: %d %d", &outer, &inner) == 2 && inner == getpid();
    free(status);
    return good;
}

static void enter(const char *root)
{
    if (!in_namespace())
        failed("this needs a namespace of processes of its own: it kills all others");
    report = fcntl(2, F_DUPFD_CLOEXEC, 3);
    __sanitizer_set_report_fd((void *)(intptr_t)report);
    __sanitizer_set_death_callback(tell);
    if (chroot(root) < 0 || chdir("/") < 0)
        failed("the root cannot be entered");
    int null = open("/dev/null", O_RDWR);
    if (null < 0 || dup2(null, 0) < 0 || dup2(null, 2) < 0) /* the agent's console is no part of the result */
        failed("there is no /dev/null");
    close(null);
}

static void open_servers(void)
{
    struct sockaddr_in port = {.sin_family = AF_INET, .sin_port = htons(8080), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_un path = {.sun_family = AF_UNIX, .sun_path = "/run/server"};
    link_up_loopback();
    listeners[0] = listening(&port, sizeof port, AF_INET);
    listeners[1] = listening(&path, sizeof path, AF_UNIX);
    for (size_t i = 0; i < sizeof accepted / sizeof *accepted; i++)
        accepted[i] = -1;
}

static int next_descriptor(void)
{
    int fd = fcntl(0, F_DUPFD_CLOEXEC, 3);
    close(fd);
    return fd;
}

int main(int argc, char **argv)
{
    if (argc != 5)
        return 2;
    signal(SIGPIPE, SIG_IGN);
    signal(SIGALRM, hung);
    signal(SIGPROF, hung);
    load_corpus(argv[2]);
    enter(argv[1]);
    umask(0);
    open_servers();
    sigset_t children;
    sigemptyset(&children);
    sigaddset(&children, SIGCHLD);
    machine.children = signalfd(-1, &children, SFD_CLOEXEC | SFD_NONBLOCK);
    sigprocmask(SIG_BLOCK, &children, NULL);
    machine.overlay = machine.random = -1;
    machine.wire_count = WIRES;
    unsigned long first = strtoul(argv[3], NULL, 10), count = strtoul(argv[4], NULL, 10);
    size_t before = 0;
    int descriptor = next_descriptor();
    for (unsigned long n = 0; n < count; n++) {
        current = first + n;
        state = current * 0x9e3779b97f4a7c15u + 1;
        alarm(HANG_S);
        setitimer(ITIMER_PROF, &(struct itimerval){.it_value.tv_sec = HANG_CPU_S}, NULL);
        play();
        if (next_descriptor() != descriptor)
            failed("a descriptor is left");
        size_t held = __sanitizer_get_current_allocated_bytes();
        if (before && held > before)
            failed("memory is left");
        before = held;
    }
    dprintf(report, "%lu inputs\n", count);
    return 0;
}
