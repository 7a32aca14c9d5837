/* Read what the start of a program reads into the page cache, so that a capture has it.
 *
 * Else each fork reads the image's dynamic loader and C library from its disk at its first command. */
#define _GNU_SOURCE
#include "helper.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#define MOST (16 << 20) /* of a file: what is named like a library may be anything */

static const char *const files[] = {
    "/etc/passwd", "/etc/group",       /* the agent looks up the user of each command */
    "/etc/ld.so.cache",                /* says where libraries are */
    "/lib64/ld-linux-x86-64.so.2",     /* glibc's loader */
    "/lib/x86_64-linux-gnu/libc.so.6", /* Debian and its derivatives */
    "/lib64/libc.so.6",                /* Fedora, SUSE */
    "/usr/lib/libc.so.6",              /* Arch */
    "/lib/ld-musl-x86_64.so.1",        /* musl: both in one */
    "/bin/sh",
};

void warm_programs(void)
{
    static char buffer[1 << 16];
    for (size_t i = 0; i < sizeof files / sizeof *files; i++) {
        int fd = open(files[i], O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
        struct stat st;
        if (fd >= 0 && fstat(fd, &st) == 0 && S_ISREG(st.st_mode)) {
            for (size_t seen = 0; seen < MOST; seen += sizeof buffer) {
                if (read(fd, buffer, sizeof buffer) <= 0)
                    break;
            }
        }
        if (fd >= 0)
            close(fd);
    }
}
