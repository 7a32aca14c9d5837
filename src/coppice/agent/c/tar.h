/* The tar format: ustar headers, and the reader of a stream from the host. */
#ifndef COPPICE_TAR_H
#define COPPICE_TAR_H

#include "helper.h"

#include <time.h>

#define BLOCK 512

/* ---- tar_holes.c ---- The archive has only the data of a file with holes. A pax header gives the
 * offsets: GNU tar's format 0.1, with GNU.sparse.size and GNU.sparse.map
 * ("offset,size,offset,size,..."). */

#define RANGES_MAX 1024           /* of one file */
#define MAP_MAX (RANGES_MAX * 42) /* length of its map: a number has at most 20 digits */

struct range {
    uint64_t at, size;
};

/* Find the data ranges of a file, ignoring holes so small that there would be too many ranges. The
 * last range is empty and marks the end of the file. */
size_t tar_find_ranges(int fd, uint64_t size, struct range *ranges);
void tar_map(const struct range *ranges, size_t count, char *text);
size_t tar_read_map(const char *text, struct range *ranges); /* 0: malformed or too long; the order of the ranges is not checked */

/* ---- tar_read.c ---- */

struct tar_header {
    char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], checksum[8], type, link[100];
    char magic[6], version[2], user[32], group[32], major[8], minor[8], prefix[155], pad[12];
};

unsigned tar_checksum(const struct tar_header *h);

struct member {
    char type;
    char name[PATH_MAX], link[PATH_MAX];
    int64_t size;   /* of the file */
    int64_t stored; /* bytes of its contents in the archive */
    int64_t mode, uid, gid, major, minor;
    struct timespec mtime;
};

struct overrides { /* fields of the next member from extended headers */
    bool name, link, size, stored, uid, gid, mtime;
    struct member value;
    size_t range_count; /* 0: the file has no holes */
    struct range ranges[RANGES_MAX];
};

struct tar_reader {
    uint8_t buffer[65536]; /* of the stream */
    size_t at, end;
    struct overrides overrides;
    struct member member;      /* the current one */
    size_t range, range_count; /* the next range of its contents, and their number, in overrides.ranges */
    uint64_t padding;          /* after its contents */
    int error;                 /* errno of the first failure, explained by `what` */
    char what[600];
};

/* Read the next member into `member`, skipping the rest of the current one. False: at the end, or
 * with `error`. */
bool tar_next(struct tar_reader *r);
/* Return more of the member's contents, as far as they have come, and its offset in the file. 0: no more,
 * or with `error`. */
size_t tar_contents(struct tar_reader *r, const uint8_t **data, uint64_t *at);
int tar_fail(struct tar_reader *r, int error, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
