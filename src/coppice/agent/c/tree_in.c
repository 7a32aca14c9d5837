/* TREE_IN: make a tree below a directory. Entries never leave it, and the last component of a path is
 * never followed. Owner, mode and time are set on the open file, so that no program in the guest can
 * replace the file meanwhile. */
#define _GNU_SOURCE
#include "tree.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define TIMES_MAX (1 << 20) /* directories, whose times are set at the end, after their contents; more are refused */

enum { MAKE = 1 };

struct entry {
    char kind;
    char path[PATH_MAX], link[PATH_MAX];
    uint64_t mode, uid, gid, major, minor;
    struct timespec mtime;
};

struct directory_time {
    char *path;
    struct timespec mtime;
};

struct unpack {
    int root;
    struct entry entry;
    uint64_t entries, bytes;
    struct directory_time *times;
    size_t time_count, time_capacity;
    size_t at, end; /* of the stream in `buffer` */
    uint8_t buffer[2 * (RECORD_HEADER + RECORD_PAYLOAD_MAX)];
};

/* ---- records ---- */

static uint8_t *take(struct unpack *u, size_t size)
{
    while (u->end - u->at < size) {
        memmove(u->buffer, u->buffer + u->at, u->end - u->at);
        u->end -= u->at;
        u->at = 0;
        ssize_t n = helper_read(u->buffer + u->end, sizeof u->buffer - 1 - u->end); /* 1: tlv_next needs a byte after a list */
        if (n <= 0)
            return NULL;
        u->end += (size_t)n;
    }
    u->at += size;
    return u->buffer + u->at - size;
}

static uint64_t load_u64(const uint8_t *p)
{
    return load_u32(p) | (uint64_t)load_u32(p + 4) << 32;
}

/* Take a record. 0: the stream ends in the middle, or is malformed. */
static enum record next_record(struct unpack *u, struct frame *f)
{
    uint8_t *header = take(u, RECORD_HEADER);
    uint8_t kind = header ? header[0] : 0;
    f->size = header ? load_u32(header + 1) : 0;
    f->payload = header && f->size <= RECORD_PAYLOAD_MAX ? take(u, f->size) : NULL;
    bool valid = f->payload && (kind == ENTRY || (kind == CONTENT && f->size >= 8) || (kind == END_FILE && f->size == 8) ||
                               (kind == END_TREE && f->size == 0));
    return valid ? kind : 0;
}

static bool set_path(char *to, struct tlv *t)
{
    const char *text = tlv_text(t);
    if (t->bad || t->size >= PATH_MAX)
        return false;
    memcpy(to, text, t->size + 1);
    return true;
}

/* tlv_next overwrites the byte after the list, the first one of the next record. */
static bool read_entry(struct entry *e, const struct frame *f)
{
    uint8_t after = f->payload[f->size];
    struct tlv t = tlv_read(f);
    bool good = true;
    int64_t mtime = 0;
    e->kind = *e->path = *e->link = 0;
    e->mode = e->uid = e->gid = e->major = e->minor = 0;
    while (good && tlv_next(&t)) {
        switch (t.tag) {
        case KIND: e->kind = t.size == 1 ? (char)*t.value : 0; break;
        case MODE: e->mode = tlv_int(&t); break;
        case UID: e->uid = tlv_int(&t); break;
        case GID: e->gid = tlv_int(&t); break;
        case MTIME: mtime = (int64_t)tlv_int(&t); break;
        case LINK: good = set_path(e->link, &t); break;
        case PATH: good = set_path(e->path, &t); break;
        case MAJOR: e->major = tlv_int(&t); break;
        case MINOR: e->minor = tlv_int(&t); break;
        default: break;
        }
    }
    int64_t part = mtime % 1000000000;
    e->mtime = (struct timespec){.tv_sec = mtime / 1000000000 - (part < 0), .tv_nsec = part < 0 ? part + 1000000000 : part};
    f->payload[f->size] = after;
    return good && !t.bad;
}

/* ---- entries ---- */

static int furnish(const struct entry *e, int fd)
{
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, e->mtime};
    if (geteuid() == 0 && fchown(fd, (uid_t)e->uid, (gid_t)e->gid) < 0)
        return errno;
    /* After chown, which clears the set-id bits. */
    return fchmod(fd, (mode_t)e->mode & 07777) < 0 || futimens(fd, times) < 0 ? errno : 0;
}

static bool is_zero(const uint8_t *data, size_t size)
{
    return size > 0 && data[0] == 0 && memcmp(data, data + 1, size - 1) == 0;
}

/* Write the content that follows. Records of zeros become holes, like those that are left out: a
 * sparse file must not fill the guest's disk. */
static int write_content(struct unpack *u, int fd)
{
    uint64_t end = 0;
    for (;;) {
        struct frame f;
        enum record kind = next_record(u, &f);
        uint64_t at = kind == CONTENT || kind == END_FILE ? load_u64(f.payload) : 0;
        if ((kind != CONTENT && kind != END_FILE) || at < end || at > (uint64_t)INT64_MAX - f.size)
            return EPROTO;
        if (kind == END_FILE) {
            u->bytes += at;
            return ftruncate(fd, (off_t)at) < 0 ? errno : 0;
        }
        size_t size = f.size - 8;
        if (!is_zero(f.payload + 8, size) && (lseek(fd, (off_t)at, SEEK_SET) < 0 || !write_all(fd, f.payload + 8, size)))
            return errno;
        end = at + size;
    }
}

static int make_regular(struct unpack *u, int parent, const char *base)
{
    int fd = openat(parent, base, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        return errno;
    int error = write_content(u, fd);
    if (!error)
        error = furnish(&u->entry, fd);
    if (close(fd) < 0 && !error)
        error = errno;
    if (error) /* a part of a file must not pass for the file */
        unlinkat(parent, base, 0);
    return error;
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
    char *path = u->time_count < u->time_capacity ? strdup(u->entry.path) : NULL;
    if (!path)
        return ENOMEM;
    u->times[u->time_count++] = (struct directory_time){path, u->entry.mtime};
    return 0;
}

static int make_directory(struct unpack *u, int parent, const char *base)
{
    if (mkdirat(parent, base, 0700) < 0) {
        if (errno != EEXIST)
            return errno;
        int there = below_open(u->root, u->entry.path);
        if (there >= 0)
            close(there);
        else if (unlinkat(parent, base, 0) < 0 || mkdirat(parent, base, 0700) < 0)
            return errno;
    }
    int fd = openat(parent, base, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (fd < 0) /* keep a link to a directory, such as /lib -> usr/lib */
        return errno == ELOOP || errno == ENOTDIR ? 0 : errno;
    int error = furnish(&u->entry, fd);
    close(fd);
    return error ? error : remember_time(u);
}

static int make_hard_link(struct unpack *u, int parent, const char *base)
{
    char *target = u->entry.link;
    if (!below_normalise(target) || !*target)
        return EXDEV;
    int from = below_parent(u->root, target, false);
    if (from < 0)
        return errno;
    int error = linkat(from, below_base(target), parent, base, 0) < 0 ? errno : 0;
    close(from);
    return error;
}

/* Links, FIFOs and devices cannot be opened, so their mode is set when they are made (the umask is
 * 0). */
static int make_special(const struct entry *e, int parent, const char *base)
{
    mode_t mode = (mode_t)e->mode & 07777;
    int result;
    if (e->kind == 'l')
        result = symlinkat(e->link, parent, base);
    else if (e->kind == 'p')
        result = mkfifoat(parent, base, mode);
    else
        result = mknodat(parent, base, (e->kind == 'c' ? S_IFCHR : S_IFBLK) | mode, makedev((unsigned)e->major, (unsigned)e->minor));
    struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, e->mtime};
    if (result == 0 && geteuid() == 0)
        result = fchownat(parent, base, (uid_t)e->uid, (gid_t)e->gid, AT_SYMLINK_NOFOLLOW);
    return result < 0 || utimensat(parent, base, times, AT_SYMLINK_NOFOLLOW) < 0 ? errno : 0;
}

static int make_in(struct unpack *u, int parent, const char *base)
{
    char kind = u->entry.kind;
    if (kind == 'd')
        return make_directory(u, parent, base);
    if (!strchr("flcbph", kind) || !kind)
        return EOPNOTSUPP;
    if (unlinkat(parent, base, 0) < 0 && errno != ENOENT)
        return errno;
    if (kind == 'f')
        return make_regular(u, parent, base);
    return kind == HARD_LINK ? make_hard_link(u, parent, base) : make_special(&u->entry, parent, base);
}

static int make_entry(struct unpack *u)
{
    struct entry *e = &u->entry;
    if (!below_normalise(e->path))
        return EXDEV;
    if (e->uid > ID_MAX || e->gid > ID_MAX || e->major > UINT32_MAX || e->minor > UINT32_MAX)
        return EINVAL;
    if (!*e->path) /* the directory itself, which the caller made */
        return e->kind == 'd' ? 0 : EINVAL;
    u->entries++;
    int parent = below_parent(u->root, e->path, true);
    if (parent < 0)
        return errno;
    int error = make_in(u, parent, below_base(e->path));
    close(parent);
    return error;
}

static void set_directory_times(struct unpack *u)
{
    for (size_t i = u->time_count; i-- > 0;) {
        struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, u->times[i].mtime};
        int parent = below_parent(u->root, u->times[i].path, false);
        if (parent >= 0) {
            utimensat(parent, below_base(u->times[i].path), times, AT_SYMLINK_NOFOLLOW);
            close(parent);
        }
        free(u->times[i].path);
    }
    free(u->times);
}

static int open_root(const char *path, bool make)
{
    if (make && mkdir(path, 0755) < 0 && errno != EEXIST)
        return -1;
    return open(path, O_PATH | O_DIRECTORY | O_CLOEXEC);
}

void tree_in(const struct frame *request)
{
    struct path_request asked = helper_request(request);
    static struct unpack u;
    u.root = open_root(asked.path, asked.flags & MAKE);
    if (u.root < 0)
        helper_fail_at(errno, asked.path);
    int error = 0;
    enum record kind;
    struct frame f;
    while (!error && (kind = next_record(&u, &f)) != END_TREE)
        error = kind == ENTRY && read_entry(&u.entry, &f) ? make_entry(&u) : EPROTO;
    set_directory_times(&u);
    if (error == EPROTO)
        helper_fail(EINVAL, "the stream of files is malformed, or ends in the middle");
    if (error)
        helper_fail(error, "%.400s: %s", u.entry.path, strerror(error));
    struct reply r = {0};
    reply_int(&r, 1, u.entries);
    reply_int(&r, 2, u.bytes);
    helper_ok(&r);
}
