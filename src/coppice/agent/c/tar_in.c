/* TAR_IN: unpack a stream below a directory. Members never leave it: paths are resolved as if the
 * directory were the root (openat2 with RESOLVE_IN_ROOT), and the last component is never followed.
 * Owner, mode and time are set on the open file, so that no program in the guest can replace the
 * file meanwhile. */
#define _GNU_SOURCE
#include "tar.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define TIMES_MAX (1 << 20) /* directories, whose times are set at the end, after their contents; more are refused */

enum { MAKE = 1 };

struct directory_time {
    char *name;
    struct timespec mtime;
};

struct unpack {
    struct tar_reader reader;
    int root;
    uint64_t members, bytes;
    struct directory_time *times;
    size_t time_count, time_capacity;
};

static int fail(struct unpack *u, int error)
{
    return tar_fail(&u->reader, error, "%.400s: %s", u->reader.member.name, strerror(error));
}

/* ---- paths below the root ---- */

static int open_below(struct unpack *u, const char *path)
{
    struct open_how how = {.flags = O_PATH | O_DIRECTORY | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};
    for (int tries = 0;; tries++) {
        int fd = (int)syscall(SYS_openat2, u->root, *path ? path : ".", &how, sizeof how);
        if (fd >= 0 || errno != EAGAIN || tries == 16) /* EAGAIN: a path component was renamed meanwhile */
            return fd;
    }
}

/* The last component starts after the last slash. */
static char *base_of(char *path)
{
    char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

/* Open a directory, making it if it is missing; its parent exists. -1 with errno. */
static int open_or_make(struct unpack *u, char *path)
{
    int directory = open_below(u, path);
    if (directory >= 0 || errno != ENOENT || !*path)
        return directory;
    char *base = base_of(path), first = *base;
    *base = 0;
    int parent = open_below(u, path);
    *base = first;
    if (parent < 0)
        return -1;
    int error = mkdirat(parent, base, 0755) < 0 ? errno : 0;
    close(parent);
    if (!error)
        return open_below(u, path);
    errno = error;
    return -1;
}

/* Open the parent of `path`, making missing directories. -1 with errno. */
static int open_parent(struct unpack *u, char *path, bool make)
{
    char *base = base_of(path);
    if (base == path)
        return open_below(u, "");
    for (char *slash = make ? strchr(path, '/') : base - 1;; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        int directory = make ? open_or_make(u, path) : open_below(u, path);
        *slash = '/';
        if (directory < 0 || slash + 1 == base)
            return directory;
        close(directory);
    }
}

/* Make a path relative, without empty and "." components; "" for the root itself. False if a
 * component is "..". */
static bool normalise(char *name)
{
    char *to = name;
    for (char *at = name; *at;) {
        size_t size = strcspn(at, "/");
        bool dot = size == 1 && at[0] == '.';
        if (size == 2 && at[0] == '.' && at[1] == '.')
            return false;
        char *next = at + size + (at[size] == '/');
        if (size > 0 && !dot) {
            if (to > name)
                *to++ = '/';
            memmove(to, at, size);
            to += size;
        }
        at = next;
    }
    *to = 0;
    return true;
}

/* ---- members ---- */

static int furnish(const struct member *m, int fd)
{
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, m->mtime};
    if (geteuid() == 0 && fchown(fd, (uid_t)m->uid, (gid_t)m->gid) < 0)
        return errno;
    /* After chown, which clears the set-id bits. */
    return fchmod(fd, (mode_t)m->mode & 07777) < 0 || futimens(fd, times) < 0 ? errno : 0;
}

static bool is_zero(const uint8_t *data, size_t size)
{
    return size > 0 && data[0] == 0 && memcmp(data, data + 1, size - 1) == 0;
}

/* Turn long runs of zeros into holes, like those that the archive lists: a sparse file must not
 * fill the guest's disk. */
static int make_regular(struct unpack *u, int parent, const char *base)
{
    int fd = openat(parent, base, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return errno;
    const uint8_t *data;
    size_t size;
    uint64_t at;
    int error = 0;
    while (!error && (size = tar_contents(&u->reader, &data, &at)) > 0) {
        if (!is_zero(data, size) && (lseek(fd, (off_t)at, SEEK_SET) < 0 || !write_all(fd, data, size)))
            error = errno;
    }
    if (!error)
        error = u->reader.error;
    if (!error && ftruncate(fd, (off_t)u->reader.member.size) < 0)
        error = errno;
    if (!error)
        error = furnish(&u->reader.member, fd);
    u->bytes += (uint64_t)u->reader.member.size;
    return close(fd) < 0 && !error ? errno : error;
}

static int remember_time(struct unpack *u)
{
    if (u->time_count == u->time_capacity && u->time_capacity < TIMES_MAX) {
        size_t capacity = u->time_capacity ? u->time_capacity * 2 : 64;
        struct directory_time *grown = realloc(u->times, capacity * sizeof *grown);
        if (grown) {
            u->times = grown;
            u->time_capacity = capacity;
        }
    }
    char *name = u->time_count < u->time_capacity ? strdup(u->reader.member.name) : NULL;
    if (!name)
        return ENOMEM;
    u->times[u->time_count++] = (struct directory_time){name, u->reader.member.mtime};
    return 0;
}

static int make_directory(struct unpack *u, int parent, const char *base)
{
    if (mkdirat(parent, base, 0700) < 0) {
        if (errno != EEXIST)
            return errno;
        int there = open_below(u, u->reader.member.name);
        if (there >= 0)
            close(there);
        else if (unlinkat(parent, base, 0) < 0 || mkdirat(parent, base, 0700) < 0)
            return errno;
    }
    int fd = openat(parent, base, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) /* keep a link to a directory, such as /lib -> usr/lib */
        return errno == ELOOP || errno == ENOTDIR ? 0 : errno;
    int error = furnish(&u->reader.member, fd);
    close(fd);
    return error ? error : remember_time(u);
}

static int make_hard_link(struct unpack *u, int parent, const char *base)
{
    char *target = u->reader.member.link;
    if (!normalise(target) || !*target)
        return EXDEV;
    int from = open_parent(u, target, false);
    if (from < 0)
        return errno;
    int error = linkat(from, base_of(target), parent, base, 0) < 0 ? errno : 0;
    close(from);
    return error;
}

/* Links, FIFOs and devices cannot be opened, so their mode is set when they are made (the umask is
 * 0). */
static int make_special(const struct member *m, int parent, const char *base)
{
    mode_t mode = (mode_t)m->mode & 07777;
    int result;
    if (m->type == '2')
        result = symlinkat(m->link, parent, base);
    else if (m->type == '6')
        result = mkfifoat(parent, base, mode);
    else
        result = mknodat(parent, base, (m->type == '3' ? S_IFCHR : S_IFBLK) | mode, makedev((unsigned)m->major, (unsigned)m->minor));
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, m->mtime};
    if (result == 0 && geteuid() == 0)
        result = fchownat(parent, base, (uid_t)m->uid, (gid_t)m->gid, AT_SYMLINK_NOFOLLOW);
    return result < 0 || utimensat(parent, base, times, AT_SYMLINK_NOFOLLOW) < 0 ? errno : 0;
}

static int make_in(struct unpack *u, int parent, const char *base)
{
    struct member *m = &u->reader.member;
    if (m->type == '5')
        return make_directory(u, parent, base);
    if (unlinkat(parent, base, 0) < 0 && errno != ENOENT)
        return errno;
    switch (m->type) {
    case '0': return make_regular(u, parent, base);
    case '1': return make_hard_link(u, parent, base);
    case '2': case '3': case '4': case '6': return make_special(m, parent, base);
    default: return EOPNOTSUPP;
    }
}

static void make_member(struct unpack *u)
{
    struct member *m = &u->reader.member;
    if (!normalise(m->name)) {
        fail(u, EXDEV);
        return;
    }
    if (!*m->name) { /* the directory itself, which the caller made */
        if (m->type != '5')
            fail(u, EINVAL);
        return;
    }
    if (m->uid < 0 || m->uid > ID_MAX || m->gid < 0 || m->gid > ID_MAX || m->major > UINT32_MAX || m->minor > UINT32_MAX) {
        fail(u, EINVAL);
        return;
    }
    int parent = open_parent(u, m->name, true);
    int error = parent < 0 ? errno : make_in(u, parent, base_of(m->name));
    if (parent >= 0)
        close(parent);
    if (error)
        fail(u, error);
    u->members++;
}

static void set_directory_times(struct unpack *u)
{
    for (size_t i = u->time_count; i-- > 0;) {
        struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, u->times[i].mtime};
        int parent = open_parent(u, u->times[i].name, false);
        if (parent >= 0) {
            utimensat(parent, base_of(u->times[i].name), times, AT_SYMLINK_NOFOLLOW);
            close(parent);
        }
        free(u->times[i].name);
    }
    free(u->times);
}

static int open_root(const char *path, bool make)
{
    if (make && mkdir(path, 0755) < 0 && errno != EEXIST)
        return -1;
    return open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
}

void tar_in(const struct frame *f)
{
    char *path = NULL;
    uint64_t flags = 0;
    struct tlv t = tlv_read(f);
    while (tlv_next(&t)) {
        if (t.tag == 1)
            path = tlv_text(&t);
        else if (t.tag == 2)
            flags = tlv_int(&t);
    }
    bool valid = !t.bad && path && *path;
    static struct unpack u;
    u.root = valid ? open_root(path, flags & MAKE) : -1;
    if (u.root < 0) {
        int error = valid ? errno : EINVAL;
        helper_fail(error, "%.300s: %s", valid ? path : "request", strerror(error));
    }
    while (tar_next(&u.reader))
        make_member(&u);
    set_directory_times(&u);
    if (u.reader.error)
        helper_fail(u.reader.error, "%s", u.reader.what);
    struct reply r = {0};
    reply_int(&r, 1, u.members);
    reply_int(&r, 2, u.bytes);
    helper_ok(&r);
}
