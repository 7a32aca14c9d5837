/* FILE_READ, FILE_WRITE, FILE_STAT. */
#define _GNU_SOURCE
#include "tree.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { APPEND = 1, MAKE_PARENTS = 2, FOLLOW = 1 };

struct file_request {
    const char *path;
    uint64_t number[6]; /* by tag */
    bool has[6];
    bool bad;
};

static struct file_request read_request(const struct frame *f)
{
    struct file_request r = {0};
    struct tlv t = tlv_read(f);
    while (tlv_next(&t)) {
        if (t.tag == 1) {
            r.path = tlv_text(&t);
        } else if (t.tag < 6) {
            r.number[t.tag] = tlv_int(&t);
            r.has[t.tag] = true;
        }
    }
    r.bad = t.bad || !r.path || !*r.path;
    return r;
}

static _Noreturn void fail(int error, const char *path)
{
    helper_fail_at(error, path ? path : "request");
}

/* ---- reading ---- */

static int open_to_read(const char *path)
{
    /* O_NONBLOCK: opening a FIFO must not block. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
    struct stat status;
    if (fd < 0)
        return -1;
    int error = fstat(fd, &status) < 0 ? errno : S_ISDIR(status.st_mode) ? EISDIR : S_ISFIFO(status.st_mode) ? EINVAL : 0;
    if (!error)
        return fd;
    close(fd);
    errno = error;
    return -1;
}

/* The file's size does not matter: what can be read is its content. */
void file_read(const struct frame *f)
{
    struct file_request r = read_request(f);
    int fd = r.bad ? -1 : open_to_read(r.path);
    if (fd < 0)
        fail(r.bad ? EINVAL : errno, r.path);
    if (r.number[2] && lseek(fd, (off_t)r.number[2], SEEK_SET) < 0)
        fail(errno, r.path);
    uint64_t left = r.number[3] ? r.number[3] : UINT64_MAX, sent = 0;
    static uint8_t chunk[65536];
    while (left > 0) {
        ssize_t n = read(fd, chunk, left < sizeof chunk ? (size_t)left : sizeof chunk);
        if (n < 0 && errno != EINTR)
            fail(errno, r.path);
        if (n == 0 || (n > 0 && !helper_put(chunk, (size_t)n)))
            break;
        sent += n > 0 ? (uint64_t)n : 0;
        left -= n > 0 ? (uint64_t)n : 0;
    }
    struct reply reply = {0};
    reply_int(&reply, 1, sent);
    helper_ok(&reply);
}

/* ---- writing ---- */

struct target {
    char path[PATH_MAX]; /* the file to write, with all links resolved */
    char temporary[PATH_MAX + 32];
    int fd;
    bool renamed; /* the temporary file is written, and then renamed to `path` */
};

static int open_target(struct target *t, struct file_request *r)
{
    struct stat old;
    if (r->number[3] > ID_MAX || r->number[4] > ID_MAX)
        return EINVAL;
    if (strlen(r->path) >= sizeof t->path)
        return ENAMETOOLONG;
    strcpy(t->path, r->path);
    int error = r->number[5] & MAKE_PARENTS ? make_parents(t->path) : 0;
    if (error)
        return error;
    bool exists = lstat(t->path, &old) == 0;
    if (exists && S_ISLNK(old.st_mode) && (!realpath(r->path, t->path) || stat(t->path, &old) < 0))
        return errno;
    if (exists && S_ISDIR(old.st_mode))
        return EISDIR;
    uint64_t given = r->has[2] ? r->number[2] & 07777 : 0644;
    t->renamed = !(r->number[5] & APPEND) && (!exists || S_ISREG(old.st_mode));
    if (!t->renamed) {
        int create = exists ? 0 : O_CREAT | O_EXCL;
        t->fd = open(t->path, O_WRONLY | O_APPEND | O_CLOEXEC | O_NOCTTY | O_NONBLOCK | create, (mode_t)given);
        return t->fd < 0 ? errno : 0;
    }
    const char *slash = strrchr(t->path, '/');
    snprintf(t->temporary, sizeof t->temporary, "%.*s.coppice-%d-%llx", slash ? (int)(slash - t->path + 1) : 0, t->path, getpid(),
             (unsigned long long)now_us());
    t->fd = open(t->temporary, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (t->fd < 0)
        return errno;
    uid_t uid = r->has[3] ? (uid_t)r->number[3] : exists ? old.st_uid : (uid_t)-1;
    gid_t gid = r->has[4] ? (gid_t)r->number[4] : exists ? old.st_gid : (gid_t)-1;
    mode_t mode = r->has[2] || !exists ? (mode_t)given : old.st_mode & 07777;
    if (((uid != (uid_t)-1 || gid != (gid_t)-1) && fchown(t->fd, uid, gid) < 0) || fchmod(t->fd, mode) < 0) {
        error = errno;
        close(t->fd);
        unlink(t->temporary);
    }
    return error;
}

void file_write(const struct frame *f)
{
    struct file_request r = read_request(f);
    struct target t;
    int error = r.bad ? EINVAL : open_target(&t, &r);
    if (error)
        fail(error, r.path);
    static uint8_t chunk[65536];
    ssize_t n;
    while ((n = helper_read(chunk, sizeof chunk)) > 0 && !error)
        error = write_all(t.fd, chunk, (size_t)n) ? 0 : errno;
    if (n < 0)
        error = ECANCELED;
    if (close(t.fd) < 0 && !error)
        error = errno;
    if (t.renamed && !error && rename(t.temporary, t.path) < 0)
        error = errno;
    if (t.renamed && error)
        unlink(t.temporary);
    if (error)
        fail(error, t.path);
    helper_ok(NULL);
}

/* ---- looking ---- */

void file_stat(const struct frame *f)
{
    struct file_request r = read_request(f);
    struct stat status;
    int flags = r.number[2] & FOLLOW ? 0 : AT_SYMLINK_NOFOLLOW;
    if (r.bad || fstatat(AT_FDCWD, r.path, &status, flags) < 0)
        fail(r.bad ? EINVAL : errno, r.path);
    struct reply reply = {0};
    status_put(&reply, status_kind(&status), &status);
    reply_int(&reply, SIZE, (uint64_t)status.st_size);
    char link[PATH_MAX];
    ssize_t size = S_ISLNK(status.st_mode) ? readlink(r.path, link, sizeof link) : -1;
    if (size > 0)
        reply_bytes(&reply, LINK, link, (size_t)size);
    helper_ok(&reply);
}
