/* The frame of a process that serves one request. */
#define _GNU_SOURCE
#include "helper.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { INPUT = 0, OUTPUT = 1, REPLY = 3 };

static volatile sig_atomic_t cancelled;

static void cancel(int signal)
{
    (void)signal;
    cancelled = 1;
}

void helper_begin(int in, int out, int reply)
{
    int fds[3] = {fcntl(in, F_DUPFD, 4), fcntl(out, F_DUPFD, 4), fcntl(reply, F_DUPFD, 4)};
    if (dup2(fds[0], INPUT) < 0 || dup2(fds[1], OUTPUT) < 0 || dup2(fds[2], REPLY) < 0)
        _exit(1);
    if (syscall(SYS_close_range, 4, ~0u, 0) < 0) { /* kernels before 5.9 */
        for (int fd = 4; fd < 20000; fd++)
            close(fd);
    }
    struct sigaction action = {.sa_handler = cancel}; /* without SA_RESTART */
    sigaction(SIGTERM, &action, NULL);
}

bool helper_put(const void *data, size_t size)
{
    return !cancelled && write_all(OUTPUT, data, size);
}

ssize_t helper_read(void *data, size_t size)
{
    ssize_t n = -1;
    while (!cancelled && (n = read(INPUT, data, size)) < 0 && errno == EINTR) {
    }
    return cancelled ? -1 : n;
}

/* A signal that comes just before a call does not wake it. The agent then closes the output too. */
bool helper_wait(int fd)
{
    struct pollfd watched[] = {{.fd = fd, .events = POLLIN}, {.fd = OUTPUT}};
    while (!cancelled && poll(watched, 2, -1) < 0 && errno == EINTR) {
    }
    return !cancelled && !watched[1].revents;
}

static _Noreturn void finish(uint8_t type, const struct reply *r)
{
    uint8_t message[1 + sizeof r->data];
    message[0] = type;
    memcpy(message + 1, r->data, r->size);
    write_all(REPLY, message, 1 + r->size);
    _exit(0);
}

void helper_ok(const struct reply *r)
{
    static const struct reply nothing;
    finish(OK, r ? r : &nothing);
}

void helper_fail(int error, const char *format, ...)
{
    char text[700];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    struct reply r;
    reply_error(&r, error, "%s", text);
    finish(ERROR, &r);
}

void helper_fail_at(int error, const char *path)
{
    helper_fail(error, "%.300s: %s", path, strerror(error));
}

struct path_request helper_request(const struct frame *f)
{
    struct path_request r = {.mode = 0755};
    struct tlv t = tlv_read(f);
    while (tlv_next(&t)) {
        switch (t.tag) {
        case 1: r.path = tlv_text(&t); break;
        case 2: r.flags = tlv_int(&t); break;
        case 3: r.to = tlv_text(&t); break;
        case 4: r.mode = tlv_int(&t) & 07777; break;
        default: break;
        }
    }
    if (t.bad || !r.path || !*r.path)
        helper_fail_at(EINVAL, "request");
    return r;
}
