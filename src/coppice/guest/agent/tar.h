/* The tar format: ustar headers, and the reader of a stream from the host. */
#ifndef COPPICE_TAR_H
#define COPPICE_TAR_H

#include "agent.h"

#include <time.h>

#define BLOCK 512

struct tar_header {
    char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], checksum[8], type, link[100];
    char magic[6], version[2], user[32], group[32], major[8], minor[8], prefix[155], pad[12];
};

unsigned tar_checksum(const struct tar_header *h);

struct member {
    char type;
    char name[PATH_MAX], link[PATH_MAX];
    int64_t size, mode, uid, gid, major, minor;
    struct timespec mtime;
};

struct overrides { /* what extended headers say of the next member */
    bool name, link, size, uid, gid, mtime;
    struct member value;
};

struct tar_reader {
    struct upload upload;
    struct overrides overrides;
    struct member member; /* the present one */
    uint64_t left;        /* of its contents */
    uint64_t padding;     /* after them */
    int error;            /* errno of the first failure, which `what` explains */
    char what[600];
};

/* The next member into `member`. False: at the end, or with `error`. What is left of the one before is skipped. */
bool tar_next(struct tar_reader *r);
/* More of the contents of the member, as it lies in the frame. 0: no more, or with `error`. */
size_t tar_contents(struct tar_reader *r, const uint8_t **data);
int tar_fail(struct tar_reader *r, int error, const char *format, ...) __attribute__((format(printf, 3, 4)));

#endif
