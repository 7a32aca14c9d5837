/* What passes over the streams of jobs. Nothing here waits. */
#include "jobs.h"

#include <signal.h>
#include <stdlib.h>

#define RESERVE 256     /* space that output leaves for other frames */
#define PIECE_MAX 16384 /* so that streams take turns */

static struct stream *stream_find(const struct wire *w, uint16_t id)
{
    for (struct job *j = job_first(); j; j = j->next) {
        for (struct stream *s = j->streams; s; s = s->next) {
            if (s->wire == w && s->id == id)
                return s;
        }
    }
    return NULL;
}

bool streams_take(struct wire *w, const struct frame *f)
{
    struct stream *s = stream_find(w, f->stream);
    if (!s || f->type == PING)
        return false;
    if (s->final)
        return true;
    if (f->type == WINDOW && f->size == 4 && load_u32(f->payload) <= UINT32_MAX - s->credit) {
        s->credit += load_u32(f->payload);
    } else if (f->type == LEAVE && s->job->kind == COMMAND) {
        s->job->detached |= s->job->streams == s && !s->next;
        stream_close(s, OK, NULL);
    } else if (f->type == END) {
        uint64_t signal = 0;
        struct tlv t = tlv_read(f);
        while (tlv_next(&t))
            signal = t.tag == 1 ? tlv_int(&t) : signal;
        s->output = false;
        s->job->forgotten |= !signal;
        job_end(s->job, signal && signal <= 64 ? (int)signal : SIGHUP);
    } else {
        input_take(s, f);
        return true;
    }
    return true;
}

void streams_drop(struct wire *w)
{
    for (struct job *j = job_first(); j; j = j->next) {
        for (struct stream *s = j->streams, *next; s; s = next) {
            next = s->next;
            if (s->wire == w)
                stream_free(s);
        }
        if (!j->streams && j->kind != COMMAND)
            job_end(j, SIGTERM);
    }
}

/* Bytes of records that the slowest stream has not sent yet. */
uint64_t job_lag(const struct job *j)
{
    uint64_t end = j->output.base + j->output.end, most = 0;
    for (struct stream *s = j->streams; s; s = s->next) {
        if (s->output && end - s->cursor.position - s->cursor.skip > most)
            most = end - s->cursor.position - s->cursor.skip;
    }
    return most;
}

/* Output that no stream takes now is left to the process; without a stream, the oldest is dropped. */
bool job_wants_output(const struct job *j)
{
    return job_lag(j) < j->kept / 4 + PIECE_MAX;
}

/* Put one frame. False: nothing can be sent now, or the stream is gone. */
static bool send_one(struct stream *s)
{
    struct job *j = s->job;
    struct piece p;
    if (s->wire->over || wire_room(s->wire) < RESERVE + PIECE_MAX)
        return false;
    if (j->dialed && !j->final)
        return false;
    if (s->first && !j->dialed) {
        wire_put(s->wire, STARTED, s->id, s->first->data, s->first->size);
        free(s->first);
        s->first = NULL;
        return true;
    }
    if (s->output && s->cursor.position < j->output.base + j->output.start)
        s->dropped += output_seek(&j->output, s->cursor.offset, &s->cursor);
    if (s->output && s->dropped) {
        uint8_t count[8];
        store_u32(count, (uint32_t)s->dropped);
        store_u32(count + 4, (uint32_t)(s->dropped >> 32));
        s->dropped = 0;
        return wire_put(s->wire, DROPPED, s->id, count, sizeof count);
    }
    bool more = s->output && output_next(&j->output, &s->cursor, &p);
    if (more && s->credit == 0)
        return false;
    if (more) {
        p.size = p.size < PIECE_MAX ? p.size : PIECE_MAX;
        p.size = p.size < s->credit ? p.size : s->credit;
        wire_put(s->wire, p.kind, s->id, p.data, p.size);
        output_advance(&j->output, &s->cursor, p.size);
        s->credit -= (uint32_t)p.size;
        return true;
    }
    if (j->kind == CONNECTION && j->out < 0 && !s->eof_told && !s->final && j->final != ERROR)
        return s->eof_told = wire_put(s->wire, DATA_EOF, s->id, NULL, 0);
    uint8_t final = s->final ? s->final : j->final;
    const struct payload *last = s->final ? s->last : j->last;
    if (final && wire_put(s->wire, final, s->id, last ? last->data : NULL, last ? last->size : 0))
        stream_free(s);
    return false;
}

void streams_send(void)
{
    for (bool moved = true; moved;) {
        moved = false;
        for (struct job *j = job_first(); j; j = j->next) {
            for (struct stream *s = j->streams, *next; s; s = next) {
                next = s->next;
                moved |= send_one(s);
            }
        }
        for (struct job *j = moved ? job_first() : NULL; j; j = j->next) {
            if (j->streams)
                wire_flush(j->streams->wire);
        }
    }
    jobs_rotate();
}
