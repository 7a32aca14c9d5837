/* The table of jobs, and of the hosts' streams to them. */
#include "jobs.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>

#define KILL_AFTER_MS 500 /* from the first signal to SIGKILL */
#define LISTED_ARGV 1024  /* bytes of a command's arguments in a list */
#define HELPER_MS 10000   /* the same for a helper, which has temporary files to remove */

static struct job *jobs; /* in the order in which they began */
static size_t job_count;

struct job *job_new(enum job_kind kind)
{
    struct job *j = job_count < JOBS_MAX ? calloc(1, sizeof *j) : NULL, **end = &jobs;
    if (!j)
        return NULL;
    *j = (struct job){.kind = kind, .in = -1, .out = -1, .err = -1, .terminal = -1, .window = WINDOW_SIZE, .kept = KEPT_SIZE};
    while (*end)
        end = &(*end)->next;
    *end = j;
    job_count++;
    return j;
}

struct job *job_first(void)
{
    return jobs;
}

/* Another job is the first in the next turn. */
void jobs_rotate(void)
{
    struct job *first = jobs, **end = &jobs;
    if (!first || !first->next)
        return;
    jobs = first->next;
    first->next = NULL;
    while (*end)
        end = &(*end)->next;
    *end = first;
}

struct job *job_find(const char *id)
{
    struct job *j = jobs;
    while (j && (j->kind != COMMAND || strcmp(j->id, id) != 0))
        j = j->next;
    return j;
}

static void close_all(struct job *j)
{
    shut(&j->in);
    shut(&j->out);
    shut(&j->err);
    shut(&j->terminal);
}

void stream_free(struct stream *s)
{
    struct stream **at = &s->job->streams;
    while (*at != s)
        at = &(*at)->next;
    *at = s->next;
    free(s->first);
    free(s->last);
    free(s);
}

void job_free(struct job *j)
{
    struct job **at = &jobs;
    while (*at != j)
        at = &(*at)->next;
    *at = j->next;
    job_count--;
    while (j->streams)
        stream_free(j->streams);
    close_all(j);
    group_remove(j);
    output_free(&j->output);
    free(j->input);
    free(j->reply);
    free(j->last);
    free(j->about);
    free(j);
}

bool job_describe(struct job *j, const char *id, uint64_t flags, const char *user, char **argv)
{
    struct reply about = {0};
    strcpy(j->id, id);
    reply_text(&about, 1, id);
    reply_int(&about, 2, (uint64_t)j->pid);
    reply_int(&about, 3, flags);
    reply_int(&about, 4, clock_now());
    reply_text(&about, 5, user);
    for (; *argv && about.size < LISTED_ARGV; argv++) {
        size_t size = strlen(*argv);
        reply_bytes(&about, 10, *argv, size < LISTED_ARGV ? size : LISTED_ARGV);
    }
    j->about = payload_of(&about);
    return j->about;
}

struct payload *payload_of(const struct reply *r)
{
    size_t size = r ? r->size : 0;
    struct payload *made = malloc(sizeof *made + size);
    if (!made)
        return NULL;
    made->size = size;
    if (size > 0)
        memcpy(made->data, r->data, size);
    return made;
}

struct stream *job_stream(struct job *j, struct wire *w, uint16_t id)
{
    struct stream *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    *s = (struct stream){.next = j->streams, .wire = w, .job = j, .id = id, .output = true, .credit = CREDIT_SIZE};
    output_seek(&j->output, j->output.total, &s->cursor);
    j->streams = s;
    return s;
}

void job_finish(struct job *j, uint8_t final, const struct reply *last)
{
    close_all(j);
    j->final = final;
    j->last = payload_of(last);
    free(j->input);
    j->input = NULL;
    j->start = j->end = 0;
}

void stream_open(struct stream *s, const struct reply *started)
{
    s->first = payload_of(started);
}

void stream_close(struct stream *s, uint8_t final, const struct reply *last)
{
    if (s->final)
        return;
    s->final = final;
    s->last = payload_of(last);
    s->output = s->input = false;
}

void answer(struct wire *w, uint16_t stream, uint8_t type, const struct reply *reply)
{
    if (wire_put(w, type, stream, reply ? reply->data : NULL, reply ? reply->size : 0) || w->over)
        return;
    struct job *j = job_new(ANSWER);
    if (!j || !job_stream(j, w, stream))
        wire_violation(w, "the host does not read the replies");
    if (j)
        job_finish(j, type, reply);
}

void answer_error(struct wire *w, uint16_t stream, int error, const char *what)
{
    struct reply r;
    reply_error(&r, error, "%.300s: %s", what, strerror(error));
    answer(w, stream, ERROR, &r);
}

void job_end(struct job *j, int signal)
{
    if (j->final || j->ending)
        return;
    j->ending = true;
    j->timeout_at = 0;
    if (j->kind == CONNECTION) {
        j->error = ECANCELED;
        shut(&j->in);
        shut(&j->out);
    } else if (!j->exited) {
        group_kill(j, j->kind == HELPER ? SIGTERM : signal); /* a helper handles SIGTERM alone */
        group_kill(j, SIGCONT);
        j->kill_at = now_ms() + (j->kind == HELPER ? HELPER_MS : KILL_AFTER_MS);
    }
    if (j->kind == HELPER) { /* after the signal, so that it does not take this for the end of the data */
        shut(&j->in);
        shut(&j->out);
    }
}

void stream_violation(struct stream *s, const struct frame *f)
{
    struct reply r;
    reply_error(&r, EPROTO, "a frame of type %u breaks the protocol", f->type);
    if (s->job->kind != COMMAND)
        job_end(s->job, SIGTERM);
    stream_close(s, ERROR, &r);
}
