/* Read a tar stream from the host: ustar, with pax records or GNU long names. */
#include "tar.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXTENDED_MAX 65536 /* a pax header, or a GNU long name */

int tar_fail(struct tar_reader *r, int error, const char *format, ...)
{
    if (!r->error) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(r->what, sizeof r->what, format, arguments);
        va_end(arguments);
        r->error = error;
    }
    return error;
}

static bool fail(struct tar_reader *r, const char *what)
{
    tar_fail(r, EINVAL, "%s", what);
    return false;
}

/* ---- the stream ---- */

/* Take up to `size` bytes. 0: the stream is at its end, or the host is gone. */
static size_t take(struct tar_reader *r, const uint8_t **data, size_t size)
{
    if (r->at == r->end) {
        ssize_t n = helper_read(r->buffer, sizeof r->buffer);
        r->at = 0;
        r->end = n > 0 ? (size_t)n : 0;
    }
    size_t n = r->end - r->at < size ? r->end - r->at : size;
    *data = r->buffer + r->at;
    r->at += n;
    return n;
}

/* Take exactly `size` bytes; `to` may be NULL. */
static bool copy(struct tar_reader *r, void *to, uint64_t size)
{
    uint8_t *at = to;
    const uint8_t *data;
    while (size > 0) {
        size_t n = take(r, &data, size < CHUNK ? (size_t)size : CHUNK);
        if (n == 0)
            return fail(r, "the archive ends in the middle");
        if (at) {
            memcpy(at, data, n);
            at += n;
        }
        size -= n;
    }
    return true;
}

static uint64_t padding(uint64_t size)
{
    return -size & (BLOCK - 1);
}

/* ---- extended headers ---- */

static bool set_path(char *to, const char *value, size_t size)
{
    if (size >= PATH_MAX || memchr(value, 0, size))
        return false;
    memcpy(to, value, size);
    to[size] = 0;
    return true;
}

static bool decimal(const char *value, int64_t *number)
{
    char *end;
    errno = 0;
    *number = strtoll(value, &end, 10);
    return end != value && !errno && (*end == 0 || *end == '.');
}

static bool pax_time(const char *value, struct timespec *time)
{
    int64_t seconds;
    if (!decimal(value, &seconds))
        return false;
    *time = (struct timespec){.tv_sec = seconds};
    const char *digit = strchr(value, '.');
    for (long unit = 100000000; digit && unit > 0 && digit[1] >= '0' && digit[1] <= '9'; unit /= 10)
        time->tv_nsec += (*++digit - '0') * unit;
    if (*value == '-' && time->tv_nsec > 0) {
        time->tv_sec--;
        time->tv_nsec = 1000000000 - time->tv_nsec;
    }
    return true;
}

static bool pax_record(struct overrides *o, const char *key, const char *value, size_t size)
{
    if (strcmp(key, "path") == 0)
        return o->name = set_path(o->value.name, value, size);
    if (strcmp(key, "linkpath") == 0)
        return o->link = set_path(o->value.link, value, size);
    if (strcmp(key, "size") == 0)
        return o->stored = decimal(value, &o->value.stored) && o->value.stored >= 0;
    if (strcmp(key, "GNU.sparse.size") == 0)
        return o->size = decimal(value, &o->value.size) && o->value.size >= 0;
    if (strcmp(key, "GNU.sparse.map") == 0)
        return (o->range_count = tar_read_map(value, o->ranges)) > 0;
    if (strcmp(key, "uid") == 0)
        return o->uid = decimal(value, &o->value.uid);
    if (strcmp(key, "gid") == 0)
        return o->gid = decimal(value, &o->value.gid);
    if (strcmp(key, "mtime") == 0)
        return o->mtime = pax_time(value, &o->value.mtime);
    return true;
}

/* Parse "LENGTH key=value\n", repeated; LENGTH counts all of it. A zero follows the last byte. */
static bool pax_records(struct overrides *o, char *data, size_t size)
{
    while (size > 0) {
        char *end;
        errno = 0;
        unsigned long long length = strtoull(data, &end, 10);
        if (errno || *end != ' ' || length > size || (size_t)(end + 1 - data) >= length || data[length - 1] != '\n')
            return false;
        data[length - 1] = 0;
        char *equals = strchr(end + 1, '=');
        if (!equals)
            return false;
        *equals = 0;
        if (!pax_record(o, end + 1, equals + 1, (size_t)(data + length - 1 - (equals + 1))))
            return false;
        data += length;
        size -= length;
    }
    return true;
}

static bool extended(struct tar_reader *r, char type, int64_t size)
{
    if (size > EXTENDED_MAX)
        return fail(r, "an extended header is too long");
    char *data = malloc((size_t)size + 1);
    if (!data || !copy(r, data, (uint64_t)size) || !copy(r, NULL, padding((uint64_t)size))) {
        free(data);
        return fail(r, "there is no memory for an extended header");
    }
    data[size] = 0;
    struct overrides *o = &r->overrides;
    bool ok = true;
    if (type == 'L')
        ok = o->name = set_path(o->value.name, data, strlen(data));
    else if (type == 'K')
        ok = o->link = set_path(o->value.link, data, strlen(data));
    else if (type == 'x')
        ok = pax_records(o, data, (size_t)size);
    free(data);
    return ok || fail(r, "an extended header is malformed");
}

/* ---- headers ---- */

/* Parse an octal number, or one in base 256, which GNU tar uses for large values. */
static bool number(const char *field, size_t width, int64_t *value)
{
    const uint8_t *p = (const uint8_t *)field;
    bool negative = p[0] == 0xff;
    uint64_t n = negative ? UINT64_MAX : 0;
    size_t i = 0;
    if (p[0] & 0x80) {
        if (!negative && p[0] != 0x80)
            return false;
        for (i = 1; i < width; i++) {
            if (i + 8 < width && p[i] != (negative ? 0xff : 0))
                return false;
            n = n << 8 | p[i];
        }
        *value = (int64_t)n;
        return negative == (*value < 0);
    }
    while (i < width && p[i] == ' ')
        i++;
    for (; i < width && p[i] >= '0' && p[i] <= '7'; i++)
        n = n << 3 | (uint64_t)(p[i] - '0'); /* at most 12 digits: no overflow */
    *value = (int64_t)n;
    return i == width || p[i] == 0 || p[i] == ' ';
}

static bool parse(const struct tar_header *h, struct member *m)
{
    int64_t checksum, mtime;
    if (!number(h->checksum, sizeof h->checksum, &checksum) || checksum != tar_checksum(h) ||
        !number(h->size, sizeof h->size, &m->stored) || !number(h->mode, sizeof h->mode, &m->mode) ||
        !number(h->uid, sizeof h->uid, &m->uid) || !number(h->gid, sizeof h->gid, &m->gid) ||
        !number(h->mtime, sizeof h->mtime, &mtime) || m->stored < 0)
        return false;
    m->type = !h->type || h->type == '7' ? '0' : h->type; /* 7: a contiguous file, treated as a regular one */
    m->mtime = (struct timespec){.tv_sec = mtime};
    m->major = m->minor = 0;
    if ((m->type == '3' || m->type == '4') &&
        (!number(h->major, sizeof h->major, &m->major) || !number(h->minor, sizeof h->minor, &m->minor)))
        return false;
    bool has_prefix = memcmp(h->magic, "ustar\0", 6) == 0 && h->prefix[0]; /* GNU tar's own format uses the field otherwise */
    snprintf(m->name, sizeof m->name, "%.*s%s%.*s", has_prefix ? (int)sizeof h->prefix : 0, h->prefix, has_prefix ? "/" : "",
             (int)sizeof h->name, h->name);
    snprintf(m->link, sizeof m->link, "%.*s", (int)sizeof h->link, h->link);
    return true;
}

static void apply(struct tar_reader *r)
{
    struct overrides *o = &r->overrides;
    struct member *m = &r->member;
    if (o->name)
        strcpy(m->name, o->value.name);
    if (o->link)
        strcpy(m->link, o->value.link);
    if (o->stored)
        m->stored = o->value.stored;
    m->size = o->size ? o->value.size : m->stored;
    if (o->uid)
        m->uid = o->value.uid;
    if (o->gid)
        m->gid = o->value.gid;
    if (o->mtime)
        m->mtime = o->value.mtime;
    r->range = 0;
    r->range_count = m->type == '0' ? o->range_count : 0; /* other types have no contents, even with a size: a hard link may have its file's size */
    o->range_count = 0;
    o->name = o->link = o->size = o->stored = o->uid = o->gid = o->mtime = false;
}

/* Return false if the data ranges are not in order, or do not match the stored contents. */
static bool open_contents(struct tar_reader *r)
{
    uint64_t size = (uint64_t)r->member.size, stored = (uint64_t)r->member.stored, end = 0, sum = 0;
    if (r->range_count == 0)
        r->overrides.ranges[r->range_count++] = (struct range){0, stored};
    r->padding = padding(stored);
    for (size_t i = 0; i < r->range_count; i++) {
        struct range range = r->overrides.ranges[i];
        if (range.at < end || range.at > size || range.size > size - range.at)
            return false;
        end = range.at + range.size;
        sum += range.size;
    }
    return sum == stored;
}

bool tar_next(struct tar_reader *r)
{
    static const struct tar_header zero;
    struct tar_header h;
    const uint8_t *data;
    uint64_t at;
    while (tar_contents(r, &data, &at) > 0) {
    }
    if (!r->error && copy(r, NULL, r->padding))
        r->padding = 0;
    while (!r->error && copy(r, &h, sizeof h)) {
        if (memcmp(&h, &zero, sizeof h) == 0) {
            while (take(r, &data, CHUNK) > 0) { /* the rest is padding */
            }
            return false;
        }
        if (!parse(&h, &r->member))
            return fail(r, "this is not a tar archive, or it is damaged");
        if (strchr("xgLK", r->member.type)) {
            if (!extended(r, r->member.type, r->member.stored))
                return false;
            continue;
        }
        apply(r);
        if (r->member.type == '0' && !open_contents(r))
            return fail(r, "the holes of a file make no sense");
        return true;
    }
    return false;
}

size_t tar_contents(struct tar_reader *r, const uint8_t **data, uint64_t *at)
{
    struct range *range = &r->overrides.ranges[r->range];
    while (r->range < r->range_count && range->size == 0) {
        range++;
        r->range++;
    }
    if (r->range == r->range_count || r->error)
        return 0;
    size_t n = take(r, data, range->size < CHUNK ? (size_t)range->size : CHUNK);
    if (n == 0)
        fail(r, "the archive ends in the middle");
    *at = range->at;
    range->at += n;
    range->size -= n;
    return n;
}

unsigned tar_checksum(const struct tar_header *h)
{
    const uint8_t *p = (const uint8_t *)h;
    size_t first = offsetof(struct tar_header, checksum), after = first + sizeof h->checksum;
    unsigned sum = 0;
    for (size_t i = 0; i < sizeof *h; i++)
        sum += i >= first && i < after ? ' ' : p[i];
    return sum;
}
