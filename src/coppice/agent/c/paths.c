/* FILE_LIST, FILE_MKDIR, FILE_MOVE, FILE_REMOVE. */
#define _GNU_SOURCE
#include "tree.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define DEPTH_MAX 512 /* of a tree that is removed */

enum { RECURSIVE = 1, MISSING_OK = 2, KEEP_EXISTING = 1, WITH_PARENTS = 1 };

/* ---- listing ---- */

static void list_entry(int directory, const char *name)
{
    struct stat s;
    char link[PATH_MAX];
    struct reply r;
    r.size = 0;
    if (fstatat(directory, name, &s, AT_SYMLINK_NOFOLLOW) < 0)
        return; /* removed meanwhile */
    status_put(&r, status_kind(&s), &s);
    reply_int(&r, SIZE, (uint64_t)s.st_size);
    reply_text(&r, PATH, name);
    ssize_t size = S_ISLNK(s.st_mode) ? readlinkat(directory, name, link, sizeof link) : -1;
    if (size > 0)
        reply_bytes(&r, LINK, link, (size_t)size);
    record_put(ENTRY, &r);
}

void file_list(const struct frame *f)
{
    struct path_request r = helper_request(f);
    DIR *opened = opendir(r.path);
    if (!opened)
        helper_fail_at(errno, r.path);
    struct dirent *entry;
    while ((errno = 0, entry = readdir(opened))) {
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0)
            list_entry(dirfd(opened), entry->d_name);
    }
    if (errno)
        helper_fail_at(errno, r.path);
    record_put(END_TREE, &(struct reply){0});
    record_flush();
    helper_ok(NULL);
}

/* ---- changes ---- */

void file_mkdir(const struct frame *f)
{
    struct path_request r = helper_request(f);
    size_t size = strlen(r.path);
    while (size > 1 && r.path[size - 1] == '/')
        r.path[--size] = 0;
    int error = r.flags & WITH_PARENTS ? make_parents(r.path) : 0;
    struct stat s;
    if (!error && mkdir(r.path, (mode_t)r.mode) < 0) {
        error = errno;
        if (error == EEXIST && r.flags & WITH_PARENTS && stat(r.path, &s) == 0 && S_ISDIR(s.st_mode))
            error = 0;
    } else if (!error && chmod(r.path, (mode_t)r.mode) < 0) { /* set-id bits, which mkdir leaves out */
        error = errno;
    }
    if (error)
        helper_fail_at(error, r.path);
    helper_ok(NULL);
}

void file_move(const struct frame *f)
{
    struct path_request r = helper_request(f);
    if (!r.to || !*r.to)
        helper_fail_at(EINVAL, "request");
    if (renameat2(AT_FDCWD, r.path, AT_FDCWD, r.to, r.flags & KEEP_EXISTING ? RENAME_NOREPLACE : 0) < 0) {
        int error = errno;
        helper_fail(error, "%.300s to %.300s: %s", r.path, r.to, strerror(error));
    }
    helper_ok(NULL);
}

static int remove_at(int directory, const char *name, int depth);

/* Remove what is in a directory, again if something was added meanwhile. Close it. */
static int empty(int fd, int depth)
{
    DIR *opened = fdopendir(fd);
    if (!opened) {
        int error = errno;
        close(fd);
        return error;
    }
    int error = 0;
    for (bool removed = true; removed && !error;) {
        struct dirent *entry;
        removed = false;
        rewinddir(opened);
        while (!error && (errno = 0, entry = readdir(opened))) {
            if (strcmp(entry->d_name, ".") == 0 || strcmp(entry->d_name, "..") == 0)
                continue;
            error = remove_at(fd, entry->d_name, depth + 1);
            removed = true;
        }
        if (!error)
            error = errno;
    }
    closedir(opened);
    return error;
}

/* Links are not followed: a program in the guest cannot lead this elsewhere. */
static int remove_at(int directory, const char *name, int depth)
{
    if (unlinkat(directory, name, 0) == 0 || (errno == ENOENT && depth > 0))
        return 0;
    if (errno != EISDIR)
        return errno;
    if (depth == DEPTH_MAX)
        return ELOOP;
    int fd = openat(directory, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    int error = fd < 0 ? errno : empty(fd, depth);
    return !error && unlinkat(directory, name, AT_REMOVEDIR) < 0 && errno != ENOENT ? errno : error;
}

void file_remove(const struct frame *f)
{
    struct path_request r = helper_request(f);
    struct stat s, root;
    if (lstat(r.path, &s) < 0) {
        if (errno == ENOENT && r.flags & MISSING_OK)
            helper_ok(NULL);
        helper_fail_at(errno, r.path);
    }
    if (stat("/", &root) == 0 && root.st_dev == s.st_dev && root.st_ino == s.st_ino)
        helper_fail_at(EBUSY, r.path);
    int error = S_ISDIR(s.st_mode) && !(r.flags & RECURSIVE) && rmdir(r.path) < 0 ? errno : 0;
    if (!S_ISDIR(s.st_mode) || r.flags & RECURSIVE)
        error = remove_at(AT_FDCWD, r.path, 0);
    if (error)
        helper_fail_at(error, r.path);
    helper_ok(NULL);
}
