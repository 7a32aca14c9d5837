/* The latest output of a command. */
#include "output.h"

#include <stdlib.h>
#include <string.h>

#define HEADER 4 /* the kind, and the size in three bytes */
#define SMALLEST 4096

static size_t size_at(const struct output *o, size_t at)
{
    return (size_t)o->data[at + 1] | (size_t)o->data[at + 2] << 8 | (size_t)o->data[at + 3] << 16;
}

static void set_size(struct output *o, size_t at, size_t size)
{
    o->data[at + 1] = (uint8_t)size;
    o->data[at + 2] = (uint8_t)(size >> 8);
    o->data[at + 3] = (uint8_t)(size >> 16);
}

/* The limit of the capacity leaves slack, so that contents are seldom moved. */
static bool grow(struct output *o, size_t need, size_t most)
{
    size_t limit = most + most / 4 + need;
    size_t capacity = o->capacity * 2 < SMALLEST ? SMALLEST : o->capacity * 2;
    while (capacity < o->end + need)
        capacity *= 2;
    uint8_t *grown = realloc(o->data, capacity < limit ? capacity : limit);
    if (!grown)
        return false;
    o->data = grown;
    o->capacity = capacity < limit ? capacity : limit;
    return true;
}

uint8_t *output_reserve(struct output *o, size_t bound)
{
    size_t need = HEADER + RECORD_MAX, most = 2 * bound + need; /* many short records take more space than their contents */
    while (o->end > o->start) {
        size_t size = size_at(o, o->start);
        if (o->total - o->first < bound + size && o->end - o->start <= most)
            break;
        o->start += HEADER + size;
        o->first += size;
    }
    if (o->capacity - o->end < need && o->start > 0 && (o->start >= most / 4 || o->start == o->end)) {
        memmove(o->data, o->data + o->start, o->end - o->start);
        o->base += o->start;
        o->end -= o->start;
        o->last -= o->start;
        o->start = 0;
    }
    if (o->capacity - o->end < need && !grow(o, need, most))
        return NULL;
    return o->data + o->end + HEADER;
}

void output_commit(struct output *o, uint8_t kind, size_t size)
{
    size_t before = o->end > o->start && o->data[o->last] == kind ? size_at(o, o->last) : RECORD_MAX;
    if (before + size <= RECORD_MAX) {
        memmove(o->data + o->end, o->data + o->end + HEADER, size);
        set_size(o, o->last, before + size);
        o->end += size;
    } else {
        o->last = o->end;
        o->data[o->last] = kind;
        set_size(o, o->last, size);
        o->end += HEADER + size;
    }
    o->total += size;
}

void output_free(struct output *o)
{
    free(o->data);
    o->data = NULL;
    o->base += o->end;
    o->start = o->end = o->capacity = 0;
    o->first = o->total;
}

uint64_t output_seek(const struct output *o, uint64_t offset, struct cursor *c)
{
    uint64_t dropped = offset < o->first ? o->first - offset : 0;
    size_t at = o->start;
    c->offset = o->first;
    c->skip = 0;
    if (offset > o->total)
        offset = o->total;
    /* Not beyond the last record: it may still grow. */
    while (at < o->end && c->offset + size_at(o, at) <= offset && at + HEADER + size_at(o, at) < o->end) {
        c->offset += size_at(o, at);
        at += HEADER + size_at(o, at);
    }
    c->position = o->base + at;
    if (at < o->end && offset > c->offset) {
        c->skip = (uint32_t)(offset - c->offset);
        c->offset = offset;
    }
    return dropped;
}

/* A record grows after all of it was sent, so a cursor stays at the last record. */
bool output_next(const struct output *o, const struct cursor *c, struct piece *p)
{
    size_t at = (size_t)(c->position - o->base), skip = c->skip;
    if (at >= o->end)
        return false;
    if (skip == size_at(o, at)) {
        at += HEADER + skip;
        skip = 0;
        if (at >= o->end)
            return false;
    }
    *p = (struct piece){.kind = o->data[at], .data = o->data + at + HEADER + skip, .size = size_at(o, at) - skip};
    return true;
}

void output_advance(const struct output *o, struct cursor *c, size_t size)
{
    size_t at = (size_t)(c->position - o->base), whole = size_at(o, at);
    if (c->skip == whole) {
        c->position += HEADER + whole;
        c->skip = 0;
    }
    c->skip += (uint32_t)size;
    c->offset += size;
}
