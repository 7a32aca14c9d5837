/* Paths below a directory. No path leaves it: paths are resolved as if the directory were the root
 * (openat2 with RESOLVE_IN_ROOT). */
#define _GNU_SOURCE
#include "tree.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/openat2.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

bool below_normalise(char *name)
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

char *below_base(char *path)
{
    char *slash = strrchr(path, '/');
    return slash ? slash + 1 : path;
}

int below_open(int root, const char *path)
{
    struct open_how how = {.flags = O_PATH | O_DIRECTORY | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS};
    for (int tries = 0;; tries++) {
        int fd = (int)syscall(SYS_openat2, root, *path ? path : ".", &how, sizeof how);
        if (fd >= 0 || errno != EAGAIN || tries == 16) /* EAGAIN: a path component was renamed meanwhile */
            return fd;
    }
}

/* Open a directory, making it if it is missing; its parent exists. -1 with errno. */
static int open_or_make(int root, char *path)
{
    int directory = below_open(root, path);
    if (directory >= 0 || errno != ENOENT || !*path)
        return directory;
    char *base = below_base(path), first = *base;
    *base = 0;
    int parent = below_open(root, path);
    *base = first;
    if (parent < 0)
        return -1;
    int error = mkdirat(parent, base, 0755) < 0 ? errno : 0;
    close(parent);
    if (!error)
        return below_open(root, path);
    errno = error;
    return -1;
}

int below_parent(int root, char *path, bool make_missing)
{
    char *base = below_base(path);
    if (base == path)
        return below_open(root, "");
    base[-1] = 0;
    int parent = below_open(root, path);
    base[-1] = '/';
    if (parent >= 0 || errno != ENOENT || !make_missing)
        return parent;
    for (char *slash = strchr(path, '/');; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        int directory = open_or_make(root, path);
        *slash = '/';
        if (directory < 0 || slash + 1 == base)
            return directory;
        close(directory);
    }
}
