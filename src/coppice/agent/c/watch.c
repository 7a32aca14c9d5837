/* FILE_WATCH: report the changes of a file, of a directory, or of all directories below it.
 *
 * The kernel watches single directories, by a number. A directory that appears in a watched tree is
 * watched too, and what is in it by then is reported as created: an entry may be reported twice, and
 * none is missed. If the kernel has dropped events, this is an event. */
#define _GNU_SOURCE
#include "tree.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <unistd.h>

#define WATCHES_MAX 65536
#define DEPTH_MAX 128
#define EVENTS (IN_CREATE | IN_DELETE | IN_MODIFY | IN_CLOSE_WRITE | IN_ATTRIB | IN_MOVED_FROM | IN_MOVED_TO | IN_DELETE_SELF | IN_MOVE_SELF)

enum { RECURSIVE = 1 };
enum event_tag { MASK = 11, COOKIE = 12 };

struct watch {
    int number;
    char *path; /* below the root; empty: the root itself */
};

struct watcher {
    int inotify;
    const char *root;
    bool recursive;
    struct watch *watches; /* in the order of their numbers, which go up */
    size_t count, capacity;
};

static void tell(uint32_t mask, uint32_t cookie, const char *path)
{
    struct reply r;
    r.size = 0;
    reply_int(&r, MASK, mask);
    reply_int(&r, COOKIE, cookie);
    reply_text(&r, PATH, path);
    record_put(EVENT, &r);
}

/* ---- the watches ---- */

/* The index of a number, or where it belongs. */
static size_t place_of(const struct watcher *w, int number)
{
    size_t low = 0, high = w->count;
    while (low < high) {
        size_t middle = (low + high) / 2;
        if (w->watches[middle].number < number)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

static struct watch *find(struct watcher *w, int number)
{
    size_t at = place_of(w, number);
    return at < w->count && w->watches[at].number == number ? &w->watches[at] : NULL;
}

static void forget(struct watcher *w, struct watch *watch)
{
    free(watch->path);
    memmove(watch, watch + 1, (size_t)(w->watches + w->count - watch - 1) * sizeof *watch);
    w->count--;
}

static int remember(struct watcher *w, int number, const char *path)
{
    char *copy = strdup(path);
    struct watch *known = find(w, number);
    if (copy && known) { /* the same directory, under a new name */
        free(known->path);
        known->path = copy;
        return 0;
    }
    if (copy && w->count == w->capacity && w->capacity < WATCHES_MAX) {
        size_t capacity = w->capacity ? 2 * w->capacity : 64;
        struct watch *grown = realloc(w->watches, capacity * sizeof *grown);
        w->watches = grown ? grown : w->watches;
        w->capacity = grown ? capacity : w->capacity;
    }
    if (!copy || w->count == w->capacity) {
        free(copy);
        return ENOSPC;
    }
    size_t at = place_of(w, number);
    memmove(w->watches + at + 1, w->watches + at, (w->count - at) * sizeof *w->watches);
    w->watches[at] = (struct watch){number, copy};
    w->count++;
    return 0;
}

static bool is_below(const char *path, const char *directory)
{
    size_t size = strlen(directory);
    return strncmp(path, directory, size) == 0 && (path[size] == '/' || !path[size]);
}

/* A directory has left its place: what happens in it belongs to another path, or to none. */
static void leave(struct watcher *w, const char *path)
{
    for (size_t i = w->count; i-- > 0;) {
        if (is_below(w->watches[i].path, path)) {
            inotify_rm_watch(w->inotify, w->watches[i].number);
            forget(w, &w->watches[i]);
        }
    }
}

static const char *reason(int error)
{
    switch (error) {
    case ENOSPC: return "there are more directories than can be watched";
    case ENAMETOOLONG: return "a path below is longer than can be watched";
    default: return strerror(error);
    }
}

static _Noreturn void fail(int error, const char *path)
{
    record_flush();
    helper_fail(error, "%.300s: %s", path, reason(error));
}

static void join(char *to, const char *directory, const char *name)
{
    if (snprintf(to, PATH_MAX, "%s%s%s", directory, *directory && *name ? "/" : "", name) >= PATH_MAX)
        fail(ENAMETOOLONG, directory);
}

static bool is_gone(int error)
{
    return error == ENOENT || error == ENOTDIR || error == ESRCH || error == EINVAL; /* the last two: /proc of an ended process */
}

/* Watch a path and, in a recursive watch, the directories below it. `report`: tell the host each of their entries.
 * Entries that are gone again are left out. Any other error ends the watch, because it would miss changes. */
static void enter(struct watcher *w, const char *path, bool report, int depth)
{
    char whole[PATH_MAX], name[PATH_MAX];
    join(whole, w->root, path);
    int number = inotify_add_watch(w->inotify, whole, EVENTS | (*path ? IN_ONLYDIR | IN_DONT_FOLLOW : 0));
    if (number < 0 && *path && is_gone(errno))
        return;
    int error = number < 0 ? errno : depth > DEPTH_MAX ? ELOOP : remember(w, number, path);
    if (error)
        fail(error, whole);
    if (!w->recursive)
        return;
    DIR *opened = opendir(whole);
    struct dirent *entry;
    while (opened && (errno = 0, entry = readdir(opened))) {
        struct stat s;
        if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
            continue;
        join(name, path, entry->d_name);
        if (fstatat(dirfd(opened), entry->d_name, &s, AT_SYMLINK_NOFOLLOW) < 0) {
            if (!is_gone(errno))
                break;
            continue;
        }
        if (report)
            tell(IN_CREATE | (S_ISDIR(s.st_mode) ? IN_ISDIR : 0), 0, name);
        if (S_ISDIR(s.st_mode))
            enter(w, name, report, depth + 1);
    }
    if (errno && !is_gone(errno))
        fail(errno, whole);
    if (opened)
        closedir(opened);
}

/* ---- the events ---- */

static void take(struct watcher *w, const struct inotify_event *e)
{
    char path[PATH_MAX];
    if (e->mask & IN_Q_OVERFLOW) {
        tell(IN_Q_OVERFLOW, 0, "");
        if (w->recursive)
            enter(w, "", false, 0); /* directories whose appearance was dropped */
        return;
    }
    struct watch *watch = find(w, e->wd);
    if (!watch)
        return; /* of a directory that has left */
    bool is_root = !*watch->path;
    join(path, watch->path, e->len ? e->name : "");
    if (e->mask & IN_IGNORED)
        forget(w, watch);
    if (e->mask & (IN_DELETE_SELF | IN_MOVE_SELF | IN_IGNORED | IN_UNMOUNT)) {
        if (is_root) { /* others are told by the events of their parents */
            tell(IN_DELETE_SELF, 0, "");
            record_flush();
            helper_ok(NULL);
        }
        return;
    }
    if (!is_root && !e->len)
        return; /* a change of a directory itself, which its parent has told */
    tell(e->mask, e->cookie, path);
    if (!w->recursive || !(e->mask & IN_ISDIR))
        return;
    if (e->mask & (IN_MOVED_FROM | IN_DELETE))
        leave(w, path);
    if (e->mask & (IN_MOVED_TO | IN_CREATE))
        enter(w, path, true, 0);
}

void file_watch(const struct frame *f)
{
    static struct watcher w;
    struct path_request asked = helper_request(f);
    w.root = asked.path;
    w.recursive = asked.flags & RECURSIVE;
    w.inotify = inotify_init1(IN_CLOEXEC);
    if (w.inotify < 0)
        fail(errno, w.root);
    enter(&w, "", false, 0);
    tell(0, 0, ""); /* from now on, nothing is missed */
    record_flush();
    static char buffer[65536] __attribute__((aligned(8)));
    ssize_t size;
    while (helper_wait(w.inotify) && (size = read(w.inotify, buffer, sizeof buffer)) > 0) {
        for (char *at = buffer; at < buffer + size;) {
            const struct inotify_event *e = (const struct inotify_event *)at;
            take(&w, e);
            at += sizeof *e + e->len;
        }
        record_flush();
    }
    helper_ok(NULL); /* the host has ended the request */
}
