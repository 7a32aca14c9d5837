/* TAR_OUT: send a path of the guest as a ustar stream, with pax records for large values, and
 * for holes if the host accepts them.
 *
 * The walk keeps one open directory per level and does not recurse. The content of a file is what
 * can be read: the size that a file claims is used only if the file system stores the file. A file
 * that grows is sent with the size that it had when its turn came. A file that shrinks fails the
 * copy, because its header has been sent. */
#define _GNU_SOURCE
#include "tar.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define DEPTH_MAX 128
#define SPOOL_MAX (64u << 20) /* content of a file without a true size, such as those of /proc */
#define LINKS_MAX 65536 /* remembered files with several names; beyond that, each name becomes a separate file */

enum { CONTENTS = 1, HOLES = 2 };

struct link {
    dev_t device;
    ino_t inode;
    char *name;
};

struct pax {
    size_t size;
    char data[3 * PATH_MAX + MAP_MAX];
};

struct archive {
    bool holes;                      /* send maps of holes */
    struct range ranges[RANGES_MAX]; /* of the current file */
    char map[MAP_MAX];               /* the same as text, if the file has holes */
    struct pax pax;
    size_t used;
    struct link *links;
    size_t link_count, link_capacity; /* a power of two; open addressing */
    uint8_t chunk[65536];
};

/* ---- the stream ---- */

static void flush(struct archive *a)
{
    if (!helper_put(a->chunk, a->used))
        _exit(0); /* the host is gone */
    a->used = 0;
}

static void put(struct archive *a, const void *data, size_t size)
{
    const uint8_t *at = data;
    while (size > 0) {
        size_t n = sizeof a->chunk - a->used < size ? sizeof a->chunk - a->used : size;
        if (at) {
            memcpy(a->chunk + a->used, at, n);
            at += n;
        } else {
            memset(a->chunk + a->used, 0, n);
        }
        a->used += n;
        size -= n;
        if (a->used == sizeof a->chunk)
            flush(a);
    }
}

static void pad(struct archive *a, uint64_t size)
{
    put(a, NULL, (size_t)(-size & (BLOCK - 1)));
}

/* ---- headers ---- */

static void octal(char *field, size_t width, uint64_t value)
{
    char digits[32];
    snprintf(digits, sizeof digits, "%0*llo", (int)width - 1, (unsigned long long)value);
    memcpy(field, digits, width);
}

static bool fits(uint64_t value, size_t width)
{
    return value < 1ull << (3 * (width - 1));
}

static void put_header(struct archive *a, struct tar_header *h)
{
    memcpy(h->magic, "ustar", 6);
    memcpy(h->version, "00", 2);
    snprintf(h->checksum, sizeof h->checksum, "%06o", tar_checksum(h));
    h->checksum[7] = ' ';
    put(a, h, sizeof *h);
}

/* "LENGTH key=value\n", where LENGTH counts itself. */
static void pax_add(struct pax *p, const char *key, const char *value)
{
    size_t body = strlen(key) + strlen(value) + 3, total = 0, before;
    do {
        before = total;
        total = body + (size_t)snprintf(NULL, 0, "%zu", total);
    } while (total != before);
    size_t space = sizeof p->data - p->size;
    if (total < space)
        p->size += (size_t)snprintf(p->data + p->size, space, "%zu %s=%s\n", total, key, value);
}

static void pax_number(struct pax *p, const char *key, int64_t value)
{
    char text[32];
    snprintf(text, sizeof text, "%lld", (long long)value);
    pax_add(p, key, text);
}

/* `stored`: bytes of contents that follow. */
static void put_member(struct archive *a, const char *name, const char *link, char type, const struct stat *s, uint64_t stored)
{
    struct tar_header h = {.type = type};
    struct pax *pax = &a->pax;
    pax->size = 0;
    if (*a->map) {
        pax_number(pax, "GNU.sparse.size", s->st_size);
        pax_add(pax, "GNU.sparse.map", a->map);
        *a->map = 0;
    }
    if (strlen(name) > sizeof h.name)
        pax_add(pax, "path", name);
    memcpy(h.name, name, strnlen(name, sizeof h.name));
    if (link) {
        if (strlen(link) > sizeof h.link)
            pax_add(pax, "linkpath", link);
        memcpy(h.link, link, strnlen(link, sizeof h.link));
    }
    octal(h.mode, sizeof h.mode, s->st_mode & 07777);
    const struct {
        const char *key;
        char *field;
        size_t width;
        int64_t value;
    } numbers[] = {
        {"uid", h.uid, sizeof h.uid, s->st_uid},
        {"gid", h.gid, sizeof h.gid, s->st_gid},
        {"size", h.size, sizeof h.size, (int64_t)stored},
        {"mtime", h.mtime, sizeof h.mtime, s->st_mtim.tv_sec},
    };
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++) {
        bool ok = numbers[i].value >= 0 && fits((uint64_t)numbers[i].value, numbers[i].width);
        octal(numbers[i].field, numbers[i].width, ok ? (uint64_t)numbers[i].value : 0);
        if (!ok)
            pax_number(pax, numbers[i].key, numbers[i].value);
    }
    if (type == '3' || type == '4') {
        octal(h.major, sizeof h.major, major(s->st_rdev));
        octal(h.minor, sizeof h.minor, minor(s->st_rdev));
    }
    if (pax->size > 0) {
        struct tar_header x = {.type = 'x', .name = "pax", .mode = "0000644", .uid = "0000000", .gid = "0000000"};
        octal(x.size, sizeof x.size, pax->size);
        octal(x.mtime, sizeof x.mtime, 0);
        put_header(a, &x);
        put(a, pax->data, pax->size);
        pad(a, pax->size);
    }
    put_header(a, &h);
}

/* ---- hard links ---- */

static bool grow_links(struct archive *a)
{
    size_t capacity = a->link_capacity ? a->link_capacity * 2 : 64;
    struct link *grown = calloc(capacity, sizeof *grown);
    if (!grown)
        return false;
    for (size_t i = 0; i < a->link_capacity; i++) {
        if (a->links[i].name) {
            size_t at = (a->links[i].inode * 0x9e3779b97f4a7c15u) & (capacity - 1);
            while (grown[at].name)
                at = (at + 1) & (capacity - 1);
            grown[at] = a->links[i];
        }
    }
    free(a->links);
    a->links = grown;
    a->link_capacity = capacity;
    return true;
}

/* Return the name under which the archive has this file already; or remember this name and return
 * NULL. */
static const char *earlier_name(struct archive *a, const struct stat *s, const char *name)
{
    if (a->link_count * 2 >= a->link_capacity && (a->link_count >= LINKS_MAX || !grow_links(a)))
        return NULL;
    size_t at = (s->st_ino * 0x9e3779b97f4a7c15u) & (a->link_capacity - 1);
    for (; a->links[at].name; at = (at + 1) & (a->link_capacity - 1)) {
        if (a->links[at].inode == s->st_ino && a->links[at].device == s->st_dev)
            return a->links[at].name;
    }
    char *copy = strdup(name);
    if (copy) {
        a->links[at] = (struct link){s->st_dev, s->st_ino, copy};
        a->link_count++;
    }
    return NULL;
}

/* ---- members ---- */

static void put_range(struct archive *a, int fd, struct range r, const char *name)
{
    uint8_t buffer[16384];
    while (r.size > 0) {
        ssize_t n = pread(fd, buffer, r.size < sizeof buffer ? (size_t)r.size : sizeof buffer, (off_t)r.at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            helper_fail(errno, "%.300s: %s", name, strerror(errno));
        if (n == 0)
            helper_fail(EIO, "%.300s: the file has become shorter while it was read", name);
        put(a, buffer, (size_t)n);
        r.at += (uint64_t)n;
        r.size -= (uint64_t)n;
    }
}

/* Whether the file system only makes up the size. */
static bool has_no_size(int fd, const struct stat *s)
{
    return s->st_size == 0 || (s->st_blocks == 0 && lseek(fd, 0, SEEK_DATA) == 0);
}

static void put_unsized(struct archive *a, int fd, const char *name, struct stat *s)
{
    size_t used = 0, capacity = 0;
    char *content = NULL;
    for (;;) {
        if (used == capacity) {
            capacity = capacity ? capacity * 2 : 65536;
            content = capacity > SPOOL_MAX ? NULL : realloc(content, capacity);
            if (!content)
                helper_fail(EFBIG, "%.300s: its size is unknown, and it has more than %u MiB", name, SPOOL_MAX >> 20);
        }
        ssize_t n = read(fd, content + used, capacity - used);
        if (n < 0 && errno != EINTR)
            helper_fail(errno, "%.300s: %s", name, strerror(errno));
        if (n == 0)
            break;
        used += n > 0 ? (size_t)n : 0;
    }
    s->st_size = (off_t)used;
    put_member(a, name, NULL, '0', s, used);
    put(a, content, used);
    pad(a, used);
    free(content);
}

static int put_regular(struct archive *a, int directory, const char *base, const char *name)
{
    struct stat s;
    int fd = openat(directory, base, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOATIME);
    if (fd < 0 && errno == EPERM)
        fd = openat(directory, base, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &s) < 0)
        return errno;
    if (has_no_size(fd, &s)) {
        put_unsized(a, fd, name, &s);
        close(fd);
        return 0;
    }
    uint64_t size = (uint64_t)s.st_size, stored = 0;
    size_t count = 1;
    a->ranges[0] = (struct range){0, size};
    if (a->holes)
        count = tar_find_ranges(fd, size, a->ranges);
    for (size_t i = 0; i < count; i++)
        stored += a->ranges[i].size;
    if (stored < size)
        tar_map(a->ranges, count, a->map);
    put_member(a, name, NULL, '0', &s, stored);
    for (size_t i = 0; i < count; i++)
        put_range(a, fd, a->ranges[i], name);
    close(fd);
    pad(a, stored);
    return 0;
}

/* Send a member that is not a directory. */
static int put_leaf(struct archive *a, int directory, const char *base, const char *name, const struct stat *s)
{
    if (S_ISSOCK(s->st_mode))
        return 0; /* a socket is useless without the process that made it */
    const char *first = s->st_nlink > 1 ? earlier_name(a, s, name) : NULL;
    if (first) {
        put_member(a, name, first, '1', s, 0);
        return 0;
    }
    if (S_ISREG(s->st_mode))
        return put_regular(a, directory, base, name);
    char link[PATH_MAX];
    if (S_ISLNK(s->st_mode)) {
        ssize_t n = readlinkat(directory, base, link, sizeof link - 1);
        if (n < 0)
            return errno;
        link[n] = 0;
        put_member(a, name, link, '2', s, 0);
        return 0;
    }
    put_member(a, name, NULL, S_ISCHR(s->st_mode) ? '3' : S_ISBLK(s->st_mode) ? '4' : '6', s, 0);
    return 0;
}

/* ---- the walk ---- */

struct walk {
    DIR *level[DEPTH_MAX];
    size_t name_end[DEPTH_MAX]; /* length of the name at each level */
    int depth;
    char name[PATH_MAX];
    struct stat status; /* of `name` */
};

static int descend(struct walk *k, int directory, const char *base, int flags)
{
    if (k->depth == DEPTH_MAX)
        return ELOOP;
    int fd = openat(directory, base, O_RDONLY | O_DIRECTORY | O_CLOEXEC | flags);
    if (fd < 0)
        return errno;
    DIR *opened = fdopendir(fd);
    if (!opened) {
        int error = errno;
        close(fd);
        return error;
    }
    k->level[k->depth] = opened;
    k->name_end[k->depth++] = strlen(k->name);
    return 0;
}

static int visit(struct archive *a, struct walk *k, int directory, const char *base)
{
    if (fstatat(directory, base, &k->status, AT_SYMLINK_NOFOLLOW) < 0)
        return errno == ENOENT && k->depth > 0 ? 0 : errno; /* removed during the walk */
    if (!S_ISDIR(k->status.st_mode))
        return put_leaf(a, directory, base, k->name, &k->status);
    size_t size = strlen(k->name);
    if (size + 2 > sizeof k->name)
        return ENAMETOOLONG;
    strcpy(k->name + size, "/");
    put_member(a, k->name, NULL, '5', &k->status, 0);
    return descend(k, directory, base, O_NOFOLLOW);
}

static int walk(struct archive *a, struct walk *k)
{
    int error = 0;
    while (k->depth > 0 && !error) {
        DIR *here = k->level[k->depth - 1];
        size_t end = k->name_end[k->depth - 1];
        errno = 0;
        struct dirent *entry = readdir(here);
        if (!entry) {
            error = errno;
            closedir(here);
            k->depth--;
        } else if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0) {
            if (end + strlen(entry->d_name) >= sizeof k->name)
                error = ENAMETOOLONG;
            else {
                strcpy(k->name + end, entry->d_name);
                error = visit(a, k, dirfd(here), entry->d_name);
            }
        }
    }
    while (k->depth > 0)
        closedir(k->level[--k->depth]);
    return error;
}

static int begin(struct archive *a, struct walk *k, char *path, bool contents)
{
    if (contents)
        return descend(k, AT_FDCWD, path, 0);
    size_t size = strlen(path);
    while (size > 1 && path[size - 1] == '/')
        path[--size] = 0;
    const char *slash = strrchr(path, '/');
    const char *base = slash ? slash + 1 : path;
    if (!*base || strcmp(base, ".") == 0 || strcmp(base, "..") == 0)
        base = "root"; /* these paths have no name of their own */
    if (strlen(base) >= sizeof k->name)
        return ENAMETOOLONG;
    strcpy(k->name, base);
    return visit(a, k, AT_FDCWD, path);
}

void tar_out(const struct frame *f)
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
    if (t.bad || !path || !*path || strlen(path) >= PATH_MAX)
        helper_fail(EINVAL, "request: %s", strerror(EINVAL));
    static struct archive a;
    static struct walk k;
    a.holes = flags & HOLES;
    int error = begin(&a, &k, path, flags & CONTENTS);
    if (!error)
        error = walk(&a, &k);
    if (error)
        helper_fail(error, "%.300s: %s", k.name[0] ? k.name : path, strerror(error));
    put(&a, NULL, 2 * BLOCK);
    flush(&a);
    helper_ok(NULL);
}
