/* TREE_OUT: send a path of the guest as records.
 *
 * The walk keeps one open directory per level and does not recurse. The content of a file is what
 * can be read: the size that a file claims is used only if the file system stores the file. A file
 * that grows is sent with the size that it had when its turn came. A file that shrinks fails the
 * copy, because its size has been promised. */
#define _GNU_SOURCE
#include "tree.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DEPTH_MAX 128
#define UNSIZED_MAX (64u << 20) /* content of a file without a true size, such as those of /proc */
#define LINKS_MAX 65536 /* remembered files with several names; beyond that, each name becomes a separate file */
#define PIECE_MIN 8192 /* read at once, at least */

enum { CONTENTS = 1 };

struct link {
    dev_t device;
    ino_t inode;
    char *name;
};

struct names { /* of files with several, in the order in which they were sent */
    struct link *links;
    size_t link_count, link_capacity; /* a power of two; open addressing */
};

static void put_number(uint8_t *to, uint64_t value)
{
    store_u32(to, (uint32_t)value);
    store_u32(to + 4, (uint32_t)(value >> 32));
}

static void put_entry(const char *name, char kind, const struct stat *s, const char *link)
{
    struct reply r;
    r.size = 0;
    reply_text(&r, PATH, name);
    status_put(&r, kind, s);
    if (link)
        reply_text(&r, LINK, link);
    if (kind == 'f' && s->st_size > 0)
        reply_int(&r, SIZE, (uint64_t)s->st_size);
    record_put(ENTRY, &r);
}

/* ---- content ---- */

/* Send at most `size` bytes from `at` on. Return how many there were. */
static uint64_t put_content(int fd, uint64_t at, uint64_t size, const char *name)
{
    uint64_t begin = at, end = at + size;
    while (at < end) {
        size_t room;
        uint8_t *space = record_space(8 + PIECE_MIN, &room);
        ssize_t n = pread(fd, space + 8, end - at < room - 8 ? (size_t)(end - at) : room - 8, (off_t)at);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            helper_fail(errno, "%.300s: %s", name, strerror(errno));
        if (n == 0)
            break;
        put_number(space, at);
        record_commit(CONTENT, 8 + (size_t)n);
        at += (uint64_t)n;
    }
    return at - begin;
}

static void put_end(uint64_t size)
{
    struct reply r = {.size = 8};
    put_number(r.data, size);
    record_put(END_FILE, &r);
}

static void put_sized(int fd, uint64_t size, const char *name)
{
    struct stat now;
    bool whole = true;
    for (uint64_t at = 0; whole && at < size;) {
        off_t data = lseek(fd, (off_t)at, SEEK_DATA), hole = data < 0 ? -1 : lseek(fd, data, SEEK_HOLE);
        if (data < 0 && errno == ENXIO) /* a hole up to the end, or the file has shrunk */
            break;
        uint64_t begin = data < 0 ? at : (uint64_t)data, end = hole < 0 || (uint64_t)hole > size ? size : (uint64_t)hole;
        whole = begin >= size || put_content(fd, begin, end - begin, name) == end - begin;
        at = end;
    }
    if (!whole || fstat(fd, &now) < 0 || (uint64_t)now.st_size < size)
        helper_fail(EIO, "%.300s: the file has become shorter while it was read", name);
    put_end(size);
}

/* Whether the file system only makes up the size. */
static bool has_no_size(int fd, const struct stat *s)
{
    return s->st_size == 0 || (s->st_blocks == 0 && lseek(fd, 0, SEEK_DATA) == 0);
}

static int put_regular(int directory, const char *base, const char *name)
{
    struct stat s;
    int fd = openat(directory, base, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK | O_NOATIME);
    if (fd < 0 && errno == EPERM)
        fd = openat(directory, base, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0 || fstat(fd, &s) < 0)
        return errno;
    if (has_no_size(fd, &s))
        s.st_size = 0;
    put_entry(name, 'f', &s, NULL);
    if (s.st_size == 0) {
        uint64_t size = put_content(fd, 0, UNSIZED_MAX + 1, name);
        if (size > UNSIZED_MAX)
            helper_fail(EFBIG, "%.300s: its size is unknown, and it has more than %u MiB", name, UNSIZED_MAX >> 20);
        put_end(size);
    } else {
        put_sized(fd, (uint64_t)s.st_size, name);
    }
    close(fd);
    return 0;
}

/* ---- entries ---- */

/* ---- hard links ---- */

static bool grow_links(struct names *a)
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

/* Return the name under which this file was sent already; or remember this name and return
 * NULL. */
static const char *earlier_name(struct names *a, const struct stat *s, const char *name)
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

/* Send an entry that is not a directory. */
static int put_leaf(struct names *a, int directory, const char *base, const char *name, const struct stat *s)
{
    if (S_ISSOCK(s->st_mode))
        return 0; /* a socket is useless without the process that made it */
    const char *first = s->st_nlink > 1 ? earlier_name(a, s, name) : NULL;
    if (!first && S_ISREG(s->st_mode))
        return put_regular(directory, base, name);
    char target[PATH_MAX];
    ssize_t size = !first && S_ISLNK(s->st_mode) ? readlinkat(directory, base, target, sizeof target - 1) : 0;
    if (size < 0)
        return errno;
    target[size] = 0;
    put_entry(name, first ? HARD_LINK : status_kind(s), s, first ? first : size > 0 ? target : NULL);
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

static int visit(struct names *a, struct walk *k, int directory, const char *base)
{
    if (fstatat(directory, base, &k->status, AT_SYMLINK_NOFOLLOW) < 0)
        return errno == ENOENT && k->depth > 0 ? 0 : errno; /* removed during the walk */
    if (!S_ISDIR(k->status.st_mode))
        return put_leaf(a, directory, base, k->name, &k->status);
    size_t size = strlen(k->name);
    if (size + 2 > sizeof k->name)
        return ENAMETOOLONG;
    put_entry(k->name, 'd', &k->status, NULL);
    strcpy(k->name + size, "/");
    return descend(k, directory, base, O_NOFOLLOW);
}

static int walk(struct names *a, struct walk *k)
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

static int begin(struct names *a, struct walk *k, char *path, bool contents)
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

void tree_out(const struct frame *request)
{
    struct path_request asked = helper_request(request);
    if (strlen(asked.path) >= PATH_MAX)
        helper_fail_at(EINVAL, "request");
    static struct names a;
    static struct walk k;
    int error = begin(&a, &k, asked.path, asked.flags & CONTENTS);
    if (!error)
        error = walk(&a, &k);
    if (error)
        helper_fail_at(error, k.name[0] ? k.name : asked.path);
    record_put(END_TREE, &(struct reply){0});
    record_flush();
    helper_ok(NULL);
}
