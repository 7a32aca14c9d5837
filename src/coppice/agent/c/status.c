/* The status of a path as fields of a reply. */
#define _GNU_SOURCE
#include "tree.h"

#include <sys/sysmacros.h>

char status_kind(const struct stat *s)
{
    switch (s->st_mode & S_IFMT) {
    case S_IFDIR: return 'd';
    case S_IFLNK: return 'l';
    case S_IFCHR: return 'c';
    case S_IFBLK: return 'b';
    case S_IFIFO: return 'p';
    case S_IFSOCK: return 's';
    default: return 'f';
    }
}

void status_put(struct reply *r, char kind, const struct stat *s)
{
    reply_bytes(r, KIND, &kind, 1);
    reply_int(r, MODE, s->st_mode & 07777);
    reply_int(r, UID, s->st_uid);
    reply_int(r, GID, s->st_gid);
    reply_int(r, MTIME, (uint64_t)s->st_mtim.tv_sec * 1000000000u + (uint64_t)s->st_mtim.tv_nsec);
    if (kind == 'c' || kind == 'b') {
        reply_int(r, MAJOR, major(s->st_rdev));
        reply_int(r, MINOR, minor(s->st_rdev));
    }
}
