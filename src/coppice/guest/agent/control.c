/* The control port, and what PID 1 has to do besides: reap, keep the workers, thaw in time. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <linux/fs.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/signalfd.h>
#include <sys/sysinfo.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define RESPAWN_MS 1000 /* a worker that ended sooner than this is not started again at once */
#define FREEZE_MAX_MS 60000

static struct wire worker_wire;

/* ---- workers ---- */

static _Noreturn void work(struct machine *m, int number)
{
    sigset_t end;
    sigemptyset(&end);
    sigaddset(&end, SIGUSR1);
    int end_signal = signalfd(-1, &end, SFD_CLOEXEC | SFD_NONBLOCK);
    close(m->wire.fd);
    close(m->wire.epoll);
    close(m->children);
    for (int i = 0; i < PORT_COUNT; i++) {
        if (i != number && m->ports[i].listener >= 0)
            close(m->ports[i].listener);
    }
    struct port *port = &m->ports[number];
    int fd = port->listener >= 0 ? -1 : port_open(port);
    if ((fd < 0 && port->listener < 0) || !wire_open(&worker_wire, fd, port->listener, fd >= 0, end_signal)) {
        say("port %d: %s", number, strerror(errno));
        _exit(1);
    }
    session_serve(&worker_wire, m->shared, number);
}

void start_workers(struct machine *m)
{
    m->respawn_at = 0;
    for (int i = 1; i < PORT_COUNT; i++) {
        if (m->workers[i] || (!m->ports[i].path[0] && m->ports[i].listener < 0))
            continue;
        if (m->worker_started[i] && now_ms() - m->worker_started[i] < RESPAWN_MS) {
            m->respawn_at = now_ms() + RESPAWN_MS;
            continue;
        }
        m->shared->active[i] = 0;
        m->worker_started[i] = now_ms();
        pid_t pid = fork();
        if (pid == 0)
            work(m, i);
        if (pid > 0)
            m->workers[i] = pid;
        else
            m->respawn_at = now_ms() + RESPAWN_MS;
    }
}

void reap(struct machine *m)
{
    struct signalfd_siginfo ignored[8];
    while (read(m->children, ignored, sizeof ignored) == (ssize_t)sizeof ignored) {
    }
    pid_t pid;
    int status;
    bool lost = false;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        if (pid == m->process && !m->process_ended) {
            m->process_ended = true;
            m->process_status = exit_code_of(status);
        }
        for (int i = 1; i < PORT_COUNT; i++) {
            if (pid == m->workers[i]) {
                m->workers[i] = 0;
                lost = true;
            }
        }
    }
    if (lost)
        start_workers(m);
}

/* ---- freezing ---- */

/* The agent itself must not write to the overlay while it is frozen: it would wait for itself. */
int freeze(struct machine *m, uint64_t timeout_ms)
{
    if (m->overlay < 0)
        return EOPNOTSUPP;
    if (ioctl(m->overlay, FIFREEZE, 0) < 0 && errno != EBUSY) /* EBUSY: it is frozen */
        return errno;
    m->thaw_at = now_ms() + (int64_t)(timeout_ms && timeout_ms < FREEZE_MAX_MS ? timeout_ms : FREEZE_MAX_MS);
    return 0;
}

int thaw(struct machine *m)
{
    m->thaw_at = 0;
    return m->overlay >= 0 && ioctl(m->overlay, FITHAW, 0) < 0 && errno != EINVAL ? errno : 0; /* EINVAL: it is not frozen */
}

/* ---- requests ---- */

static void answer(struct machine *m, int error, const struct reply *reply)
{
    struct reply r = {0};
    bool sent;
    if (error) {
        reply_int(&r, 1, (uint64_t)error);
        reply_text(&r, 2, strerror(error));
        sent = wire_put(&m->wire, ERROR, r.data, r.size);
    } else {
        sent = wire_put(&m->wire, OK, reply ? reply->data : NULL, reply ? reply->size : 0);
    }
    if (!sent)
        m->wire.over = true; /* a host that asks and does not read */
}

static void health(struct machine *m)
{
    struct timespec up;
    struct sysinfo info = {0};
    clock_gettime(CLOCK_BOOTTIME, &up);
    sysinfo(&info);
    struct reply r = {0};
    reply_int(&r, 1, (uint64_t)up.tv_sec * 1000 + (uint64_t)up.tv_nsec / 1000000);
    reply_int(&r, 2, m->serial);
    reply_text(&r, 3, AGENT_VERSION);
    reply_int(&r, 4, m->process > 0 ? (uint64_t)m->process : 0);
    reply_int(&r, 5, m->process_ended ? (uint64_t)m->process_status + 1 : 0);
    reply_int(&r, 6, (uint64_t)info.loads[0] * 100 >> SI_LOAD_SHIFT);
    answer(m, 0, &r);
}

static bool milliseconds(const struct frame *f, uint64_t *value)
{
    struct tlv t = tlv_read(f);
    while (tlv_next(&t)) {
        if (t.tag == 1)
            *value = tlv_int(&t);
    }
    return !t.bad;
}

static void handle(struct machine *m, const struct frame *f)
{
    uint64_t ms = 0;
    if (m->confined && f->type != HEALTH && f->type != SYNC) {
        answer(m, EPERM, NULL);
        return;
    }
    switch (f->type) {
    case HEALTH:
        health(m);
        break;
    case IDENTITY:
        if (!identity(m, f))
            m->wire.over = true;
        break;
    case FREEZE:
        answer(m, milliseconds(f, &ms) ? freeze(m, ms) : EINVAL, NULL);
        break;
    case THAW:
        answer(m, thaw(m), NULL);
        break;
    case POWEROFF:
        if (!milliseconds(f, &ms)) {
            answer(m, EINVAL, NULL);
            break;
        }
        answer(m, 0, NULL);
        power_off(m, ms);
        break;
    case SYNC:
        sync();
        answer(m, 0, NULL);
        break;
    default:
        answer(m, ENOSYS, NULL);
    }
}

static int64_t next_deadline(const struct machine *m)
{
    return !m->thaw_at || (m->respawn_at && m->respawn_at < m->thaw_at) ? m->respawn_at : m->thaw_at;
}

void control_serve(struct machine *m)
{
    struct frame f;
    for (;;) {
        while (wire_open_session(&m->wire)) {
            if (wire_take(&m->wire, &f)) {
                if (wire_assemble(&m->wire, &f))
                    handle(m, &f);
            } else if (!m->wire.over) {
                break;
            }
        }
        wire_flush(&m->wire);
        if (m->wire.closed)
            exit(0);
        struct pollfd children = {.fd = m->children, .events = POLLIN};
        wire_wait(&m->wire, &children, 1, next_deadline(m));
        if (children.revents)
            reap(m);
        if (m->thaw_at && now_ms() >= m->thaw_at)
            thaw(m);
        if (m->respawn_at && now_ms() >= m->respawn_at)
            start_workers(m);
    }
}
