/* The turns of jobs: their output, their time, their end. Nothing here waits. */
#include "jobs.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define QUIET_MS 50     /* how long remaining background processes must be silent */
#define FINISHED_MAX 64 /* commands that have ended and are remembered */
#define FINISHED_BYTES (4u << 20)

/* ---- output ---- */

static void collect(struct job *j, int *fd, uint8_t kind)
{
    uint8_t *space = *fd < 0 ? NULL : output_reserve(&j->output, j->kind == COMMAND ? j->kept : (size_t)job_lag(j));
    if (!space)
        return;
    ssize_t n = read(*fd, space, RECORD_MAX);
    if (n < 0 && (errno == EAGAIN || errno == EINTR))
        return;
    if (n <= 0) { /* a terminal without users answers EIO */
        if (n < 0 && j->kind == CONNECTION) { /* broken in both directions, which is no end of the data */
            j->error = errno;
            shut(&j->in);
        }
        shut(fd);
        return;
    }
    output_commit(&j->output, kind, (size_t)n);
    j->quiet_at = now_ms() + QUIET_MS;
}

static void collect_reply(struct job *j)
{
    if (!j->reply)
        j->reply = calloc(1, sizeof *j->reply);
    size_t room = j->reply ? sizeof j->reply->data - j->reply->size : 0;
    ssize_t n = room ? read(j->err, j->reply->data + j->reply->size, room) : 0;
    if (n > 0)
        j->reply->size += (size_t)n;
    else if (n == 0 || errno != EAGAIN)
        shut(&j->err);
}

/* ---- processes ---- */

bool jobs_reaped(pid_t pid, int status)
{
    struct job *j = job_first();
    while (j && (j->pid != pid || j->exited))
        j = j->next;
    if (!j)
        return false;
    j->exited = true;
    j->status = status;
    j->quiet_at = now_ms() + QUIET_MS;
    if (j->ending)
        group_kill(j, SIGKILL);
    j->kill_at = 0;
    return true;
}

void jobs_end_attached(void)
{
    for (struct job *j = job_first(); j; j = j->next) {
        if (!j->detached)
            job_end(j, SIGHUP);
    }
}

bool jobs_alive(void)
{
    for (struct job *j = job_first(); j; j = j->next) {
        if (j->pid && !j->exited)
            return true;
    }
    return false;
}

/* ---- the turn ---- */

static void check_time(struct job *j, int64_t now)
{
    if (j->timeout_at && now >= j->timeout_at) {
        j->timeout_at = 0;
        j->timed_out = !j->exited;
        job_end(j, SIGTERM);
        if (j->exited) {
            shut(&j->out);
            shut(&j->err);
        }
    }
    if (j->kill_at && now >= j->kill_at) {
        j->kill_at = 0;
        group_kill(j, SIGKILL);
    }
}

static void finish_helper(struct job *j)
{
    struct reply r;
    uint8_t type = ERROR;
    if (j->reply && j->reply->size > 0 && !j->ending) {
        type = j->reply->data[0];
        r.size = j->reply->size - 1;
        memcpy(r.data, j->reply->data + 1, r.size);
    } else if (j->ending) {
        reply_error(&r, ECANCELED, "the request was cancelled");
    } else {
        reply_error(&r, EIO, "the agent's process for this request was ended by signal %d", j->status & 127);
    }
    free(j->reply);
    j->reply = NULL;
    job_finish(j, type, &r);
}

static void check_end(struct job *j, int64_t now)
{
    if (j->kind == CONNECTION && j->in < 0 && j->out < 0) {
        struct reply r = {0};
        if (j->error)
            reply_error(&r, j->error, "connection: %s", strerror(j->error));
        job_finish(j, j->error ? ERROR : OK, &r);
    }
    if (!j->exited || j->kind == CONNECTION)
        return;
    if (j->quiet_at <= now && job_wants_output(j) && j->kind == COMMAND) { /* a last look */
        collect(j, &j->out, STDOUT);
        collect(j, &j->err, STDERR);
    } else if (!job_wants_output(j)) {
        j->quiet_at = now + QUIET_MS;
    }
    if ((j->out >= 0 || j->err >= 0) && (j->quiet_at > now || j->kind == HELPER))
        return;
    if (j->kind == HELPER)
        finish_helper(j);
    else
        exec_finish(j);
}

/* Forget the oldest commands that have ended, beyond the bounds. */
static void forget(void)
{
    size_t count = 0, bytes = 0;
    for (struct job *j = job_first(), *next; j; j = next) {
        next = j->next;
        bool over = j->final && !j->streams && !j->lasting;
        if (over && (j->kind != COMMAND || j->forgotten)) {
            job_free(j);
        } else if (over) {
            count++;
            bytes += j->output.capacity;
        }
    }
    while (count > FINISHED_MAX || (bytes > FINISHED_BYTES && count > 1)) {
        struct job *oldest = NULL;
        for (struct job *j = job_first(); j; j = j->next) {
            if (j->final && !j->streams && !j->lasting && (!oldest || j->ended_ns < oldest->ended_ns))
                oldest = j;
        }
        count--;
        bytes -= oldest->output.capacity;
        job_free(oldest);
    }
}

void jobs_step(void)
{
    int64_t now = now_ms();
    for (struct job *j = job_first(); j; j = j->next) {
        if (j->final)
            continue;
        input_feed(j);
        check_time(j, now);
        check_end(j, now);
    }
    streams_send();
    forget();
}

/* ---- waiting ---- */

static int64_t sooner(int64_t a, int64_t b)
{
    return !a || (b && b < a) ? b : a;
}

int64_t jobs_deadline(void)
{
    int64_t soonest = 0;
    for (struct job *j = job_first(); j; j = j->next) {
        if (!j->final)
            soonest = sooner(soonest, sooner(j->exited && j->kind == COMMAND ? j->quiet_at : 0, sooner(j->timeout_at, j->kill_at)));
    }
    return soonest;
}

void polls_add(struct polls *p, int fd, short events)
{
    if (p->count == p->capacity) {
        size_t capacity = p->capacity ? 2 * p->capacity : 64;
        struct pollfd *grown = realloc(p->fds, capacity * sizeof *grown);
        if (!grown)
            return;
        p->fds = grown;
        p->capacity = capacity;
    }
    p->fds[p->count++] = (struct pollfd){.fd = fd, .events = events};
}

void jobs_poll(struct polls *p)
{
    for (struct job *j = job_first(); j; j = j->next) {
        bool wanted = job_wants_output(j);
        j->slot = p->count;
        if (j->in < 0 && j->out < 0 && j->err < 0)
            continue;
        polls_add(p, j->dialed || j->start < j->end ? j->in : -1, POLLOUT);
        polls_add(p, wanted && !j->dialed ? j->out : -1, POLLIN);
        polls_add(p, wanted ? j->err : -1, POLLIN);
    }
}

void jobs_ready(const struct polls *p)
{
    for (struct job *j = job_first(); j; j = j->next) {
        if (j->slot + 3 > p->count || (j->in < 0 && j->out < 0 && j->err < 0))
            continue;
        if (j->dialed && p->fds[j->slot].revents)
            socket_connected(j);
        if (p->fds[j->slot + 1].revents)
            collect(j, &j->out, j->kind == COMMAND ? STDOUT : DATA);
        if (p->fds[j->slot + 2].revents && j->kind == HELPER)
            collect_reply(j);
        else if (p->fds[j->slot + 2].revents)
            collect(j, &j->err, STDERR);
    }
}
