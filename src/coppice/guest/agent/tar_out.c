/* TAR_OUT: a path of the guest as a ustar stream, with pax records where ustar is too small, and for holes where the host takes them.
 *
 * The walk keeps one open directory per level and no recursion; what changes under it does no harm: a file that shrinks is padded
 * with zeros to the size that its header promised.
 */
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
#define LINKS_MAX 65536 /* files with several names that are remembered; beyond, each name is a file of its own */

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
    struct wire *wire;
    bool gone;                       /* the session is over */
    bool holes;                      /* are told of */
    struct range ranges[RANGES_MAX]; /* of the file that is sent */
    char map[MAP_MAX];               /* the same as text, where it has holes */
    struct pax pax;
    size_t used;
    struct link *links;
    size_t link_count, link_capacity; /* a power of two; open addressing */
    uint8_t chunk[CHUNK];
};

/* ---- the stream ---- */

static void put(struct archive *a, const void *data, size_t size)
{
    const uint8_t *at = data;
    while (size > 0 && !a->gone) {
        size_t n = sizeof a->chunk - a->used < size ? sizeof a->chunk - a->used : size;
        if (at) {
            memcpy(a->chunk + a->used, at, n);
            at += n;
        } else {
            memset(a->chunk + a->used, 0, n);
        }
        a->used += n;
        size -= n;
        if (a->used == sizeof a->chunk) {
            a->gone = !wire_send(a->wire, DATA, a->chunk, a->used);
            a->used = 0;
        }
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

/* The name under which the file is in the archive already; or NULL, and it is remembered under this one. */
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

static int put_range(struct archive *a, int fd, struct range r)
{
    int error = 0;
    uint8_t buffer[16384];
    while (r.size > 0 && !a->gone) {
        ssize_t n = pread(fd, buffer, r.size < sizeof buffer ? (size_t)r.size : sizeof buffer, (off_t)r.at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            error = n < 0 ? errno : 0;
            break;
        }
        put(a, buffer, (size_t)n);
        r.at += (uint64_t)n;
        r.size -= (uint64_t)n;
    }
    while (r.size > 0 && !a->gone && !error) {
        size_t n = r.size < BLOCK ? (size_t)r.size : BLOCK;
        put(a, NULL, n);
        r.size -= n;
    }
    return error;
}

static int put_regular(struct archive *a, int directory, const char *base, const char *name, const struct stat *s)
{
    int fd = openat(directory, base, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOATIME);
    if (fd < 0 && errno == EPERM)
        fd = openat(directory, base, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0)
        return errno;
    uint64_t size = (uint64_t)s->st_size, stored = 0;
    size_t count = 1;
    a->ranges[0] = (struct range){0, size};
    if (a->holes)
        count = tar_find_ranges(fd, size, a->ranges);
    for (size_t i = 0; i < count; i++)
        stored += a->ranges[i].size;
    if (stored < size)
        tar_map(a->ranges, count, a->map);
    put_member(a, name, NULL, '0', s, stored);
    int error = 0;
    for (size_t i = 0; i < count && !error; i++)
        error = put_range(a, fd, a->ranges[i]);
    close(fd);
    pad(a, stored);
    return error;
}

/* Everything but a directory. */
static int put_leaf(struct archive *a, int directory, const char *base, const char *name, const struct stat *s)
{
    if (S_ISSOCK(s->st_mode))
        return 0; /* a socket is nothing without the process that made it */
    const char *first = s->st_nlink > 1 ? earlier_name(a, s, name) : NULL;
    if (first) {
        put_member(a, name, first, '1', s, 0);
        return 0;
    }
    if (S_ISREG(s->st_mode))
        return put_regular(a, directory, base, name, s);
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
    size_t name_end[DEPTH_MAX]; /* how much of the name is this level's */
    int depth;
    char name[PATH_MAX];
    struct stat status; /* of what stands at `name` */
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
        return errno == ENOENT && k->depth > 0 ? 0 : errno; /* gone while walking */
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
    while (k->depth > 0 && !error && !a->gone) {
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
        base = "root"; /* a name for what has none */
    if (strlen(base) >= sizeof k->name)
        return ENAMETOOLONG;
    strcpy(k->name, base);
    return visit(a, k, AT_FDCWD, path);
}

void tar_out(struct wire *w, const struct frame *f)
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
    if (t.bad || !path || !*path || strlen(path) >= PATH_MAX) {
        wire_error(w, EINVAL, "request: %s", strerror(EINVAL));
        return;
    }
    struct archive *a = calloc(1, sizeof *a);
    struct walk *k = calloc(1, sizeof *k);
    int error = ENOMEM;
    if (a && k) {
        a->wire = w;
        a->holes = flags & HOLES;
        error = begin(a, k, path, flags & CONTENTS);
        if (!error)
            error = walk(a, k);
    }
    if (error) {
        wire_error(w, error, "%.300s: %s", k && k->name[0] ? k->name : path, strerror(error));
    } else if (!a->gone) {
        put(a, NULL, 2 * BLOCK);
        if (!a->gone && (a->used == 0 || wire_send(w, DATA, a->chunk, a->used)))
            wire_send(w, OK, NULL, 0);
    }
    for (size_t i = 0; a && i < a->link_capacity; i++)
        free(a->links[i].name);
    if (a)
        free(a->links);
    free(a);
    free(k);
}
