/* The small files below /etc and /run by which programs know what machine they are on. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

/* Make a regular file hold this and nothing else. What is the same already is not written: each block written here is a block that
 * each fork has for its own. Overwritten in place: ext4 writes a file that was truncated to nothing to the disk at once. */
int put_file(const char *path, const char *data, size_t size, mode_t mode)
{
    int fd = open(path, O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0 && (errno == ELOOP || errno == ENOENT)) { /* ELOOP: a symbolic link, to what another program manages */
        unlink(path);
        fd = open(path, O_RDWR | O_CLOEXEC | O_CREAT | O_EXCL | O_NOFOLLOW, mode);
    }
    struct stat status;
    if (fd < 0)
        return errno;
    int error = fstat(fd, &status) < 0 ? errno : 0;
    char old[256];
    bool same = !error && (size_t)status.st_size == size && size <= sizeof old && pread(fd, old, size, 0) == (ssize_t)size &&
                memcmp(old, data, size) == 0;
    if (!error && !same) {
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
    return put_file(path, line, (size_t)size, mode);
}

int remove_file(const char *path)
{
    return unlink(path) < 0 && errno != ENOENT && errno != ENOTDIR ? errno : 0;
}

/* Programs find these files in /etc, but they are in memory, mounted over those of the image, as container runtimes do it. Each fork writes them
 * anew: on the disk that would be its first write, and under emulation the way through two file systems and a journal costs tens of milliseconds. */
static void mount_over(const char *own, const char *visible)
{
    if (mount(own, visible, NULL, MS_BIND, NULL) < 0)
        say("%s cannot be changed: %s", visible, strerror(errno));
}

/* Programs read the boot-id from /proc, where the kernel does not let it be set. */
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
    static char text[65536];
    mkdir("/run/coppice/etc", 0755);
    for (size_t n = 0; n < sizeof names / sizeof *names; n++) {
        char visible[32], own[48];
        snprintf(visible, sizeof visible, "/etc/%s", names[n]);
        snprintf(own, sizeof own, "/run/coppice/etc/%s", names[n]);
        ssize_t size = read_file(visible, text, sizeof text);
        int error = put_file(own, text, size > 0 ? (size_t)size : 0, strcmp(names[n], "machine-id") == 0 ? 0444 : 0644);
        int fd = open(visible, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
        if (fd < 0) { /* there is none, or a symbolic link to what another program would manage */
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

/* The line of the own name is replaced; all others stay as they are. */
int put_hosts(const char *hostname)
{
    static const char path[] = "/etc/hosts", own[] = "127.0.1.1";
    static const char usual[] = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n";
    static char old[65536], new[sizeof old + 256];
    ssize_t size = read_file(path, old, sizeof old);
    if (size < 0)
        old[0] = 0;
    if (size == (ssize_t)sizeof old - 1)
        return 0; /* somebody's block list; the name resolves without it too, only slower */
    size_t used = strstr(old, "localhost") ? 0 : (size_t)sprintf(new, "%s", usual);
    for (const char *line = old; *line;) {
        size_t length = strcspn(line, "\n");
        bool is_own = strncmp(line, own, sizeof own - 1) == 0 && (line[sizeof own - 1] == ' ' || line[sizeof own - 1] == '\t');
        if (!is_own)
            used += (size_t)sprintf(new + used, "%.*s\n", (int)length, line);
        line += length + (line[length] == '\n');
    }
    used += (size_t)sprintf(new + used, "%s %s\n", own, hostname);
    return put_file(path, new, used, 0644);
}
