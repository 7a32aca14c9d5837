/* Time, the console, whole files. */
#include "base.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define LOAD_MAX (64u << 20) /* size of a file that can be loaded */

int64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

int64_t now_ms(void)
{
    return now_us() / 1000;
}

uint64_t clock_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

int64_t deadline_in(uint64_t ms)
{
    return now_ms() + (int64_t)(ms < INT64_MAX / 2 ? ms : INT64_MAX / 2);
}

void pause_ms(int ms)
{
    struct timespec t = {ms / 1000, ms % 1000 * 1000000L};
    while (nanosleep(&t, &t) < 0 && errno == EINTR) {
    }
}

void shut(int *fd)
{
    if (*fd >= 0)
        close(*fd);
    *fd = -1;
}

void say(const char *format, ...)
{
    char line[512];
    int size = snprintf(line, sizeof line, "coppice-agent: ");
    va_list arguments;
    va_start(arguments, format);
    int more = vsnprintf(line + size, sizeof line - (size_t)size - 1, format, arguments);
    va_end(arguments);
    size += more;
    if (size > (int)sizeof line - 2)
        size = (int)sizeof line - 2;
    line[size++] = '\n';
    write_all(STDERR_FILENO, line, (size_t)size);
}

bool write_all(int fd, const void *data, size_t size)
{
    const char *at = data;
    while (size > 0) {
        ssize_t n = write(fd, at, size);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return false;
        at += n;
        size -= (size_t)n;
    }
    return true;
}

static int open_to_read(const char *path)
{
    return open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
}

/* Read up to `capacity` bytes. -1 with errno. */
static ssize_t read_up_to(int fd, char *buffer, size_t capacity)
{
    size_t size = 0;
    while (size < capacity) {
        ssize_t n = read(fd, buffer + size, capacity - size);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -1 : (ssize_t)size;
        size += (size_t)n;
    }
    return (ssize_t)size;
}

/* Close a descriptor and preserve errno. */
static void close_quietly(int fd)
{
    int error = errno;
    close(fd);
    errno = error;
}

ssize_t read_file(const char *path, char *buffer, size_t capacity)
{
    int fd = open_to_read(path);
    if (fd < 0)
        return -1;
    ssize_t size = read_up_to(fd, buffer, capacity);
    if (size == (ssize_t)capacity) {
        size = -1;
        errno = EFBIG;
    }
    close_quietly(fd);
    if (size >= 0)
        buffer[size] = 0;
    return size;
}

char *load_open(int fd, size_t *size)
{
    if (fd < 0)
        return NULL;
    struct stat status;
    size_t used = 0, capacity = fstat(fd, &status) == 0 && status.st_size > 0 ? (size_t)status.st_size + 2 : 4096; /* files of /proc have no size */
    char *text = NULL;
    for (;;) {
        char *grown = capacity > LOAD_MAX ? NULL : realloc(text, capacity);
        ssize_t n = grown ? read_up_to(fd, grown + used, capacity - 1 - used) : -1;
        text = grown ? grown : text;
        if (n < 0) {
            errno = capacity > LOAD_MAX ? EFBIG : errno;
            free(text);
            text = NULL;
            break;
        }
        used += (size_t)n;
        if (used < capacity - 1) {
            text[used] = 0;
            *size = used;
            break;
        }
        capacity *= 2;
    }
    close_quietly(fd);
    return text;
}

char *load_file(const char *path, size_t *size)
{
    return load_open(open_to_read(path), size);
}

void sys_write(const char *path, const char *value)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return; /* this kernel lacks the parameter */
    write_all(fd, value, strlen(value));
    close(fd);
}

int make_parents(char *path)
{
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        int error = mkdir(path, 0755) < 0 && errno != EEXIST ? errno : 0;
        *slash = '/';
        if (error)
            return error;
    }
    return 0;
}

int make_directories(const char *path)
{
    char *copy = strdup(path);
    int error = copy ? make_parents(copy) : ENOMEM;
    if (!error && mkdir(path, 0755) < 0 && errno != EEXIST)
        error = errno;
    free(copy);
    return error;
}
