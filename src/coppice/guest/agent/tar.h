/* The tar format: ustar headers, and the reader of a stream from the host. */
#ifndef COPPICE_TAR_H
#define COPPICE_TAR_H

#include "agent.h"

#include <time.h>

#define BLOCK 512

/* ---- tar_holes.c ----
 * Of a file with holes only its data is in the archive, and a pax header says where it lies: GNU tar's format 0.1, which is
 * GNU.sparse.size and GNU.sparse.map ("offset,size,offset,size,..."). */

#define RANGES_MAX 1024           /* of one file */
#define MAP_MAX (RANGES_MAX * 42) /* of its map: a number has 20 digits at most */

struct range {
    uint64_t at, size;
};

/* Where a file has data, without its smaller holes: as many as make for no more ranges than there may be. The last range is empty and ends
 * the file. */
size_t tar_find_ranges(int fd, uint64_t size, struct range *ranges);
void tar_map(const struct range *ranges, size_t count, char *text);
size_t tar_read_map(const char *text, struct range *ranges); /* 0: it is malformed, or too long; whether it makes sense is not looked at */

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
    int64_t stored; /* of its contents in the archive */
    int64_t mode, uid, gid, major, minor;
    struct timespec mtime;
};

struct overrides { /* what extended headers say of the next member */
    bool name, link, size, stored, uid, gid, mtime;
    struct member value;
    size_t range_count; /* 0: the file has no holes */
    struct range ranges[RANGES_MAX];
};

struct tar_reader {
    struct upload upload;
    struct overrides overrides;
    struct member member;      /* the present one */
    size_t range, range_count; /* of its contents: which is next, in overrides.ranges */
    uint64_t padding;          /* after them */
    int error;                 /* errno of the first failure, which `what` explains */
    char what[600];
};

/* The next member into `member`. False: at the end, or with `error`. What is left of the one before is skipped. */
bool tar_next(struct tar_reader *r);
/* More of the contents of the member, as it lies in the frame, and where it belongs in the file. 0: no more, or with `error`. */
size_t tar_contents(struct tar_reader *r, const uint8_t **data, uint64_t *at);
int tar_fail(struct tar_reader *r, int error, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
