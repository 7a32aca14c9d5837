/* The small files below /etc and /run that tell programs the machine's identity. */
#define _GNU_SOURCE
#include "self.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

/* Return whether a file begins with this text. */
static bool holds(int fd, const char *data, size_t size)
{
    char chunk[4096];
    for (size_t at = 0; at < size;) {
        ssize_t n = pread(fd, chunk, size - at < sizeof chunk ? size - at : sizeof chunk, (off_t)at);
        if (n <= 0 || memcmp(chunk, data + at, (size_t)n) != 0)
            return false;
        at += (size_t)n;
    }
    return true;
}

/* Set the contents of a regular file. Equal contents are not written, since each written block is
 * one that each fork stores itself. Overwrite in place: ext4 writes a file that was truncated to
 * zero to the disk at once. */
int put_file(const char *path, const char *data, size_t size, mode_t mode)
{
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0 && (errno == ELOOP || errno == ENOENT)) { /* ELOOP: a symbolic link to a file that another program manages */
        unlink(path);
        fd = open(path, O_RDWR | O_CLOEXEC | O_CREAT | O_EXCL | O_NOFOLLOW, mode);
    }
    struct stat status;
    if (fd < 0)
        return errno;
    int error = fstat(fd, &status) < 0 ? errno : 0;
    if (!error && !((size_t)status.st_size == size && holds(fd, data, size))) {
        if (!write_all(fd, data, size) || (status.st_size > (off_t)size && ftruncate(fd, (off_t)size) < 0))
            error = errno;
    }
    close(fd);
    return error;
}

int put_line(const char *path, const char *text, mode_t mode)
{
    char line[256];
    int size = snprintf(line, sizeof line, "%s\n", text);
    return size >= (int)sizeof line ? ENAMETOOLONG : put_file(path, line, (size_t)size, mode);
}

int remove_file(const char *path)
{
    if (unlink(path) == 0)
        return 0;
    int error = errno; /* a read-only file system reports EROFS even for a missing file */
    return access(path, F_OK) < 0 && (errno == ENOENT || errno == ENOTDIR) ? 0 : error;
}

/* These files of /etc are in memory, mounted over those of the image, as in container runtimes.
 * Each fork rewrites them. On the disk, that would be its first write, which under emulation costs
 * tens of milliseconds (two file systems and a journal). */
static void mount_over(const char *own, const char *visible)
{
    if (mount(own, visible, NULL, MS_BIND, NULL) < 0)
        say("%s cannot be changed: %s", visible, strerror(errno));
}

/* Programs read the boot-id from /proc, where the kernel does not permit setting it. */
const char boot_id_path[] = "/run/coppice/boot_id";

static void mount_boot_id(void)
{
    static const char visible[] = "/proc/sys/kernel/random/boot_id";
    char text[64];
    ssize_t size = read_file(visible, text, sizeof text);
    if (size > 0 && put_file(boot_id_path, text, (size_t)size, 0444) == 0)
        mount_over(boot_id_path, visible);
}

void mount_own_files(void)
{
    static const char *const names[] = {"hostname", "hosts", "machine-id", "resolv.conf"};
    mkdir("/run/coppice/etc", 0755);
    for (size_t n = 0; n < sizeof names / sizeof *names; n++) {
        char visible[32], own[48];
        snprintf(visible, sizeof visible, "/etc/%s", names[n]);
        snprintf(own, sizeof own, "/run/coppice/etc/%s", names[n]);
        size_t size = 0;
        char *text = load_file(visible, &size);
        int error = !text && errno != ENOENT && errno != ELOOP ? errno : 0;
        if (!error)
            error = put_file(own, text, size, strcmp(names[n], "machine-id") == 0 ? 0444 : 0644);
        free(text);
        if (error)
            say("%s stays as the image has it: %s", visible, strerror(error));
        int fd = open(visible, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
        if (fd < 0) { /* missing, or a symbolic link to a file that another program would manage */
            unlink(visible);
            fd = open(visible, O_RDONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
        }
        if (fd >= 0)
            close(fd);
        if (!error && fd >= 0)
            mount_over(own, visible);
    }
    mount_boot_id();
}

/* Set the name servers, unless another program has changed the file since it was written here. */
int put_resolv_conf(const char *text)
{
    static const char path[] = "/etc/resolv.conf";
    static char *written; /* each fork inherits it with the memory */
    if (written && strcmp(written, text) == 0)
        return 0;
    size_t size = 0;
    char *now = written ? load_file(path, &size) : NULL;
    bool ours = !written || (now && size == strlen(written) && memcmp(now, written, size) == 0);
    free(now);
    if (!ours)
        return 0;
    int error = put_file(path, text, strlen(text), 0644);
    if (!error) {
        free(written);
        written = strdup(text);
    }
    return error;
}

static bool is_line_of(const char *address, const char *line, size_t size)
{
    size_t length = strlen(address);
    return size > length && memcmp(line, address, length) == 0 && (line[length] == ' ' || line[length] == '\t');
}

/* Replace the line of the machine's own name, and keep all others. */
int put_hosts(const char *hostname)
{
    static const char path[] = "/etc/hosts", own[] = "127.0.1.1";
    static const char usual[] = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n";
    size_t size = 0, used = 0;
    char *old = load_file(path, &size);
    if (!old && errno != ENOENT)
        return errno;
    char *new = malloc(sizeof usual + size + sizeof own + strlen(hostname) + 4);
    if (!new) {
        free(old);
        return ENOMEM;
    }
    if (!old || !memmem(old, size, "localhost", 9))
        used = (size_t)sprintf(new, "%s", usual);
    for (size_t at = 0; at < size;) {
        const char *line = old + at, *end = memchr(line, '\n', size - at);
        size_t length = end ? (size_t)(end - line) : size - at;
        if (!is_line_of(own, line, length)) {
            memcpy(new + used, line, length);
            used += length;
            new[used++] = '\n';
        }
        at += length + 1;
    }
    used += (size_t)sprintf(new + used, "%s %s\n", own, hostname);
    int error = put_file(path, new, used, 0644);
    free(old);
    free(new);
    return error;
}
