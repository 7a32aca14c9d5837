/* Preloaded into a program, this logs the path of each fsync and fdatasync to the file FSYNC_LOG.
 * While the file FSYNC_FAILS exists, they fail as on a broken disk. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static int synced(const char *name, int fd)
{
    char link[64], path[4096];
    const char *fails = getenv("FSYNC_FAILS");
    if (fails && access(fails, F_OK) == 0) {
        errno = EIO;
        return -1;
    }
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    int result = real(fd);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    int log = open(getenv("FSYNC_LOG"), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (result == 0 && length > 0 && log >= 0) {
        path[length++] = '\n';
        if (write(log, path, (size_t)length) < 0)
            abort();
    }
    if (log >= 0)
        close(log);
    return result;
}

int fsync(int fd)
{
    return synced("fsync", fd);
}

int fdatasync(int fd)
{
    return synced("fdatasync", fd);
}
