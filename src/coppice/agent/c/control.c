/* The agent's loop: frames of all ports, jobs, and the duties of PID 1, reaping and thawing in time. */
#include "machine.h"
#include "random.h"
#include "spawn.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void reap(struct machine *m)
{
    struct signalfd_siginfo ignored[8];
    while (read(m->children, ignored, sizeof ignored) == (ssize_t)sizeof ignored) {
    }
    pid_t pid;
    int status;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
        jobs_reaped(pid, status);
}

/* ---- requests about the machine ---- */

static void health(struct machine *m, struct reply *r)
{
    struct timespec up;
    struct sysinfo info = {0};
    clock_gettime(CLOCK_BOOTTIME, &up);
    sysinfo(&info);
    reply_int(r, 1, (uint64_t)up.tv_sec * 1000 + (uint64_t)up.tv_nsec / 1000000);
    reply_int(r, 2, m->serial);
    reply_text(r, 3, AGENT_VERSION);
    process_report(r);
    reply_int(r, 6, (uint64_t)info.loads[0] * 100 >> SI_LOAD_SHIFT);
    reply_int(r, 7, m->identified);
}

static bool number(const struct frame *f, uint64_t *value)
{
    struct tlv t = tlv_read(f);
    while (tlv_next(&t)) {
        if (t.tag == 1)
            *value = tlv_int(&t);
    }
    return !t.bad;
}

/* Return 0 or an errno, with the payload of OK or ERROR. */
static int about_machine(struct machine *m, const struct frame *f, struct reply *r)
{
    uint64_t value = 0;
    if (m->confined && f->type != HEALTH && f->type != SHARED_RANDOM)
        return EPERM;
    switch (f->type) {
    case HEALTH:
        health(m, r);
        return 0;
    case SHARED_RANDOM:
        return shared_random(r);
    case IDENTITY:
        return identity(m, f, r);
    case FREEZE:
        return number(f, &value) ? freeze(m, value) : EINVAL;
    case THAW:
        return thaw(m);
    case POWEROFF:
        return number(f, &value) ? 0 : EINVAL;
    default: /* CLOCK */
        value = number(f, &value) ? value : 0;
        int error = value ? clock_set(value) : EINVAL;
        reply_int(r, 1, clock_now());
        return error;
    }
}

static void serve_machine(struct machine *m, struct wire *w, const struct frame *f)
{
    struct reply r = {0};
    uint64_t grace_ms = 0;
    int error = about_machine(m, f, &r);
    if (error && f->type != IDENTITY)
        reply_error(&r, error, "%s", strerror(error));
    answer(w, f->stream, error ? ERROR : OK, &r);
    if (f->type == POWEROFF && !error && number(f, &grace_ms))
        power_off(m, w, grace_ms);
}

static void serve_frame(struct machine *m, struct wire *w, const struct frame *f)
{
    switch (f->type) {
    case HELLO:
        streams_drop(w);
        break;
    case PING:
        wire_put(w, PONG, 0, f->payload, f->size);
        break;
    case FORGET:
        exec_forget(f);
        break;
    case HEALTH: case IDENTITY: case FREEZE: case THAW: case POWEROFF: case CLOCK: case SHARED_RANDOM:
        serve_machine(m, w, f);
        break;
    case EXEC:
        exec_run(w, f, &m->image);
        break;
    case ATTACH:
        exec_attach(w, f);
        break;
    case LIST:
        exec_list(w, f);
        break;
    case CONNECT:
        socket_connect(w, f);
        break;
    case STDIN: case STDIN_EOF: case SIGNAL: case RESIZE: case LEAVE: case END: case WINDOW: case DATA: case DATA_EOF:
        break; /* the stream ended meanwhile */
    default:
        if (!request_start(w, f)) {
            struct reply r;
            reply_error(&r, ENOSYS, "this agent knows no request %u", f->type);
            answer(w, f->stream, ERROR, &r);
        }
    }
}

static void take_frames(struct machine *m, struct wire *w)
{
    struct frame f;
    while (wire_take(w, &f)) {
        if (!streams_take(w, &f))
            serve_frame(m, w, &f);
    }
    if (w->over)
        streams_drop(w);
}

/* ---- the loop ---- */

static int64_t sooner(int64_t a, int64_t b)
{
    return !a || (b && b < a) ? b : a;
}

static void wait_for_events(struct machine *m, struct polls *p)
{
    int64_t deadline = sooner(m->thaw_at, jobs_deadline());
    p->count = 0;
    polls_add(p, m->children, POLLIN);
    for (size_t i = 0; i < m->wire_count; i++) {
        deadline = sooner(deadline, wire_deadline(&m->wires[i]));
        polls_add(p, m->wires[i].epoll, POLLIN);
    }
    jobs_poll(p);
    int timeout = -1;
    if (deadline) {
        int64_t left = deadline - now_ms();
        timeout = left < 0 ? 0 : left > INT_MAX ? INT_MAX : (int)left;
    }
    if (poll(p->fds, p->count, timeout) <= 0)
        return;
    for (size_t i = 0; i < m->wire_count; i++) {
        if (p->fds[1 + i].revents)
            wire_event(&m->wires[i]);
    }
    jobs_ready(p);
    if (p->fds[0].revents)
        reap(m);
}

/* The agent of a test ends with its connection, after its commands. */
static void leave_test(struct machine *m)
{
    for (size_t i = 0; i < m->wire_count; i++) {
        if (!m->wires[i].closed)
            return;
    }
    for (struct job *j = job_first(); j; j = j->next)
        job_end(j, SIGHUP);
    if (!jobs_alive()) {
        for (struct job *j; (j = job_first());)
            job_free(j);
        exit(0);
    }
}

void serve(struct machine *m)
{
    struct polls polls = {0};
    for (;;) {
        for (size_t i = 0; i < m->wire_count; i++)
            take_frames(m, &m->wires[i]);
        jobs_step();
        for (size_t i = 0; i < m->wire_count; i++)
            wire_flush(&m->wires[i]);
        if (m->confined)
            leave_test(m);
        wait_for_events(m, &polls);
        if (m->thaw_at && now_ms() >= m->thaw_at)
            thaw(m);
    }
}
