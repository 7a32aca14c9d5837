/* EXEC: one command, its terminal or pipes, until it has ended and all that it said has been sent.
 *
 * While the host does not read, the command's output is not read either, but what the host sends is: signals and HELLO always get
 * through, and standard input is bounded by its window.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#define QUIET_MS 50       /* how long a daemon that was left behind must be silent */
#define KILL_AFTER_MS 500 /* from SIGTERM to SIGKILL when the timeout has passed */
#define RESERVE 64        /* room that output leaves for WINDOW and EXIT */

enum { WITH_TTY = 1, WITH_STDIN = 2, TIMED_OUT = 1 };

struct request {
    struct strings argv, env;
    const char *cwd, *user, *term;
    uint64_t flags, rows, cols, timeout_ms;
    struct account account;
    char defaults[6][320], who[300];
};

struct command {
    struct wire *wire;
    pid_t pid;
    int pidfd, in, out, err; /* -1: closed */
    int terminal;            /* kept to the end: who closes a terminal hangs up on a command that has closed its own side and is about to end */
    bool tty, exited, timed_out, in_eof;
    int64_t quiet_at, timeout_at, kill_at; /* 0: never */
    uint32_t window, owed;
    size_t start, end; /* of what waits in `input` */
};

static uint8_t input[WINDOW_SIZE + 1];

static void shut(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

/* ---- the request ---- */

static int read_request(struct request *r, const struct frame *f, struct shared *shared)
{
    bool fits = true;
    for (char *e = shared->env; e < shared->env + shared->env_size; e += strlen(e) + 1)
        fits &= env_set(&r->env, e);
    struct tlv t = tlv_read(f);
    while (tlv_next(&t)) {
        switch (t.tag) {
        case 1: fits &= strings_add(&r->argv, tlv_text(&t)); break;
        case 2: fits &= env_set(&r->env, tlv_text(&t)); break;
        case 3: r->cwd = tlv_text(&t); break;
        case 4: r->user = tlv_text(&t); break;
        case 5: r->flags = tlv_int(&t); break;
        case 6: r->rows = tlv_int(&t); break;
        case 7: r->cols = tlv_int(&t); break;
        case 8: r->timeout_ms = tlv_int(&t); break;
        case 9: r->term = tlv_text(&t); break;
        }
    }
    return !fits || t.bad || r->argv.count == 0 ? EINVAL : 0;
}

/* ---- starting ---- */

static bool open_terminal(struct request *r, struct spawn *s, struct command *c)
{
    int unlock = 0;
    int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (master < 0 || ioctl(master, TIOCSPTLCK, &unlock) < 0 ||
        (s->in = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0) {
        shut(&master);
        return false;
    }
    struct winsize size = {.ws_row = (unsigned short)r->rows, .ws_col = (unsigned short)r->cols};
    ioctl(master, TIOCSWINSZ, &size);
    if (fchown(s->in, r->account.uid, (gid_t)-1) < 0 && geteuid() == 0)
        say("the terminal keeps its owner: %s", strerror(errno));
    s->out = s->err = s->in;
    s->tty = c->tty = true;
    c->out = master;
    c->terminal = fcntl(master, F_DUPFD_CLOEXEC, 3);
    c->in = r->flags & WITH_STDIN ? fcntl(master, F_DUPFD_CLOEXEC, 3) : -1;
    return true;
}

static bool open_pipes(struct request *r, struct spawn *s, struct command *c)
{
    int in[2] = {-1, -1}, out[2] = {-1, -1}, err[2] = {-1, -1};
    if (r->flags & WITH_STDIN ? pipe2(in, O_CLOEXEC) < 0 : (in[0] = open("/dev/null", O_RDONLY | O_CLOEXEC)) < 0)
        return false;
    bool opened = pipe2(out, O_CLOEXEC) == 0 && pipe2(err, O_CLOEXEC) == 0;
    s->in = in[0], s->out = out[1], s->err = err[1];
    c->in = in[1], c->out = out[0], c->err = err[0];
    /* The user may open /dev/stdin and the like anew, which takes the right to. /dev/null is everybody's already. */
    if (opened && r->account.uid != geteuid())
        opened = (in[1] < 0 || fchown(in[0], r->account.uid, (gid_t)-1) == 0) && fchown(out[1], r->account.uid, (gid_t)-1) == 0 &&
                 fchown(err[1], r->account.uid, (gid_t)-1) == 0;
    return opened;
}

static int start(struct request *r, struct command *c, struct shared *shared, const char **failed)
{
    struct spawn s = {.argv = r->argv.items, .account = &r->account, .in = -1, .out = -1, .err = -1};
    s.cwd = r->cwd ? r->cwd : *shared->cwd ? shared->cwd : "/";
    s.cwd_optional = !r->cwd;
    const char *user = r->user ? r->user : shared->user;
    snprintf(r->who, sizeof r->who, "user %s", user);
    *failed = r->who;
    int error = account_find(user, &r->account);
    if (error)
        return error;
    *failed = "environment";
    const char *term = r->flags & WITH_TTY ? (r->term ? r->term : "xterm") : r->term;
    if (!env_defaults(&r->env, &r->account, term, r->defaults))
        return ENOMEM;
    s.env = r->env.items;
    *failed = "pipes";
    bool opened = r->flags & WITH_TTY ? open_terminal(r, &s, c) : open_pipes(r, &s, c);
    error = opened ? 0 : errno;
    if (opened) {
        c->pid = spawn(&s);
        error = s.error;
        *failed = s.failed;
    }
    shut(&s.in);
    if (!s.tty) {
        shut(&s.out);
        shut(&s.err);
    }
    if (error)
        return error;
    c->pidfd = pidfd_of(c->pid);
    for (int *fd = (int[]){c->in, c->out, c->err, -2}; *fd != -2; fd++) {
        if (*fd >= 0)
            fcntl(*fd, F_SETFL, O_NONBLOCK);
    }
    return 0;
}

/* ---- running ---- */

static void end_of_input(struct command *c)
{
    struct termios mode;
    c->in_eof = true;
    if (c->tty && c->in >= 0 && tcgetattr(c->in, &mode) == 0 && (mode.c_lflag & ICANON) && c->end < sizeof input)
        input[c->end++] = mode.c_cc[VEOF];
}

static bool take_input(struct command *c, const struct frame *f)
{
    if (c->in_eof || !window_spend(&c->window, f->size))
        return false;
    if (c->in < 0) { /* nobody reads it: it is used up */
        window_return(c->wire, &c->window, &c->owed, f->size, false);
        return true;
    }
    if (f->size > sizeof input - c->end) {
        memmove(input, input + c->start, c->end - c->start);
        c->end -= c->start;
        c->start = 0;
    }
    if (f->size > sizeof input - c->end)
        return false;
    memcpy(input + c->end, f->payload, f->size);
    c->end += f->size;
    return true;
}

static bool obey(struct command *c, const struct frame *f)
{
    switch (f->type) {
    case STDIN:
        return take_input(c, f);
    case STDIN_EOF:
        if (!c->in_eof)
            end_of_input(c);
        return true;
    case SIGNAL:
        if (f->size != 4 || load_u32(f->payload) == 0 || load_u32(f->payload) > 64)
            return false;
        if (!c->exited)
            kill(-c->pid, (int)load_u32(f->payload));
        return true;
    case RESIZE:
        if (f->size != 8)
            return false;
        if (c->terminal >= 0) {
            struct winsize size = {.ws_row = (unsigned short)load_u32(f->payload), .ws_col = (unsigned short)load_u32(f->payload + 4)};
            ioctl(c->terminal, TIOCSWINSZ, &size);
        }
        return true;
    default:
        return false;
    }
}

static void feed(struct command *c)
{
    while (c->in >= 0 && c->start < c->end) {
        ssize_t n = write(c->in, input + c->start, c->end - c->start);
        if (n < 0 && (errno == EAGAIN || errno == EINTR))
            break;
        if (n <= 0) { /* the command has closed its standard input */
            n = (ssize_t)(c->end - c->start);
            shut(&c->in);
        }
        c->start += (size_t)n;
        /* The character that stands for the end of input was never sent by the host. */
        uint32_t used = (uint32_t)n;
        if (c->in_eof && c->owed + c->window + used > WINDOW_SIZE)
            used = WINDOW_SIZE - c->owed - c->window;
        c->owed += used;
    }
    if (c->start == c->end) {
        c->start = c->end = 0;
        if (c->in_eof)
            shut(&c->in);
    }
    window_return(c->wire, &c->window, &c->owed, 0, c->end == 0);
}

/* Move what is there to the wire. True: some was. */
static bool collect(struct command *c, int *fd, uint8_t type)
{
    size_t room = wire_room(c->wire);
    if (*fd < 0 || room <= RESERVE)
        return false;
    room -= RESERVE;
    ssize_t n = read(*fd, wire_reserve(c->wire), room < CHUNK ? room : CHUNK);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return false;
    if (n <= 0) { /* a terminal whose last user is gone answers EIO */
        shut(fd);
        return false;
    }
    wire_commit(c->wire, type, (size_t)n);
    return true;
}

static int64_t sooner(int64_t a, int64_t b)
{
    return !a || (b && b < a) ? b : a;
}

static void check_time(struct command *c)
{
    int64_t now = now_ms();
    if (c->timeout_at && now >= c->timeout_at) {
        c->timeout_at = 0;
        if (c->exited) {
            shut(&c->out);
            shut(&c->err);
            return;
        }
        c->timed_out = true;
        kill(-c->pid, SIGTERM);
        kill(-c->pid, SIGCONT);
        c->kill_at = now + KILL_AFTER_MS;
    }
    if (c->kill_at && now >= c->kill_at) {
        c->kill_at = 0;
        kill(-c->pid, SIGKILL);
    }
}

static bool full(const struct command *c)
{
    return wire_room(c->wire) < CHUNK + RESERVE;
}

/* One turn. False: all has been said. */
static bool turn(struct command *c)
{
    feed(c);
    wire_flush(c->wire);
    check_time(c);
    if (c->exited && c->out < 0 && c->err < 0)
        return false;
    if (c->exited && full(c))
        c->quiet_at = now_ms() + QUIET_MS;
    struct pollfd fds[] = {
        {.fd = c->start < c->end ? c->in : -1, .events = POLLOUT},
        {.fd = full(c) ? -1 : c->out, .events = POLLIN},
        {.fd = full(c) ? -1 : c->err, .events = POLLIN},
        {.fd = c->exited ? -1 : c->pidfd, .events = POLLIN},
    };
    wire_wait(c->wire, fds, 4, sooner(c->exited ? c->quiet_at : 0, sooner(c->timeout_at, c->kill_at)));
    bool last_look = c->exited && now_ms() >= c->quiet_at && !full(c);
    bool moved = false;
    if (fds[1].revents || last_look)
        moved |= collect(c, &c->out, STDOUT);
    if (fds[2].revents || last_look)
        moved |= collect(c, &c->err, STDERR);
    if (moved)
        c->quiet_at = now_ms() + QUIET_MS;
    else if (last_look)
        return false;
    siginfo_t info = {0};
    if (fds[3].revents && waitid(P_PID, (id_t)c->pid, &info, WEXITED | WNOHANG | WNOWAIT) == 0 && info.si_pid == c->pid) {
        c->exited = true; /* not reaped: its group keeps its number until the end */
        c->quiet_at = now_ms() + QUIET_MS;
    }
    return true;
}

static void finish(struct command *c)
{
    int status = 0;
    if (c->timed_out)
        kill(-c->pid, SIGKILL);
    while (waitpid(c->pid, &status, 0) < 0 && errno == EINTR) {
    }
    struct reply r = {0};
    reply_int(&r, 1, (uint64_t)exit_code_of(status));
    reply_int(&r, 2, c->timed_out ? TIMED_OUT : 0);
    wire_send(c->wire, EXIT, r.data, r.size);
}

static void serve(struct command *c)
{
    struct frame f;
    struct reply r = {0};
    reply_int(&r, 1, (uint64_t)c->pid);
    wire_put(c->wire, STARTED, r.data, r.size);
    do {
        while (wire_take(c->wire, &f)) {
            if (!obey(c, &f)) {
                wire_error(c->wire, EPROTO, "a frame of type %u breaks the protocol", f.type);
                c->wire->over = true;
            }
        }
    } while (!c->wire->over && turn(c));
    if (c->wire->over)
        dying_add(c->pid);
    else
        finish(c);
}

void exec_run(struct wire *w, const struct frame *frame, struct shared *shared)
{
    struct request r = {0};
    struct command c = {.wire = w, .pidfd = -1, .in = -1, .out = -1, .err = -1, .terminal = -1, .window = WINDOW_SIZE};
    const char *failed = "request";
    int error = read_request(&r, frame, shared);
    if (!error)
        error = start(&r, &c, shared, &failed);
    if (error) {
        wire_error(w, error, "%s: %s", failed, strerror(error));
    } else {
        if (r.timeout_ms)
            c.timeout_at = now_ms() + (int64_t)(r.timeout_ms < INT_MAX ? r.timeout_ms : INT_MAX);
        serve(&c);
    }
    shut(&c.in);
    shut(&c.out);
    shut(&c.err);
    shut(&c.terminal);
    shut(&c.pidfd);
    free(r.argv.items);
    free(r.env.items);
}
