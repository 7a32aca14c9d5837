/* CONNECT: a stream of bytes to a TCP port of the guest itself, or to a unix socket. */
#define _GNU_SOURCE
#include "jobs.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>

/* The loopback answers at once, but not on a busy machine, and not while the server's queue is full. */
static int dial(const void *address, socklen_t size, int family, bool *pending)
{
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    *pending = false;
    if (fd < 0 || connect(fd, address, size) == 0)
        return fd;
    int error = errno;
    *pending = error == EINPROGRESS;
    if (*pending)
        return fd;
    shut(&fd);
    errno = error;
    return -1;
}

static int dial_six(uint16_t port, bool *pending)
{
    struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    return dial(&six, sizeof six, AF_INET6, pending);
}

static int dial_port(uint16_t port, bool *pending)
{
    struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = dial(&four, sizeof four, AF_INET, pending);
    int error = errno;
    if (fd < 0 && error == ECONNREFUSED)
        fd = dial_six(port, pending);
    errno = error;
    return fd;
}

static int dial_path(const char *path, bool *pending)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(address.sun_path, path);
    socklen_t size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + strlen(path) + 1);
    if (*path == '@') { /* a name without a file */
        *address.sun_path = 0;
        size--;
    }
    return dial(&address, size, AF_UNIX, pending);
}

static void take_socket(struct job *j, int fd)
{
    j->in = fd;
    j->out = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 3);
}

void socket_connected(struct job *j)
{
    int family = 0;
    bool pending = false;
    socklen_t length = sizeof j->error, size = sizeof family;
    getsockopt(j->in, SOL_SOCKET, SO_ERROR, &j->error, &length);
    getsockopt(j->in, SOL_SOCKET, SO_DOMAIN, &family, &size);
    if (j->error) {
        shut(&j->in);
        shut(&j->out);
    }
    if (j->error == ECONNREFUSED && family == AF_INET) {
        take_socket(j, dial_six(j->dialed, &pending));
        j->error = j->in < 0 ? ECONNREFUSED : 0;
    }
    if (!pending && !j->error)
        j->dialed = 0;
}

void socket_connect(struct wire *w, const struct frame *f)
{
    uint64_t port = 0;
    const char *path = NULL;
    struct tlv t = tlv_read(f);
    while (tlv_next(&t)) {
        if (t.tag == 1)
            port = tlv_int(&t);
        else if (t.tag == 2)
            path = tlv_text(&t);
    }
    if (t.bad || (path ? !*path || port : port == 0 || port > UINT16_MAX)) {
        answer_error(w, f->stream, EINVAL, "request");
        return;
    }
    char what[128];
    if (path)
        snprintf(what, sizeof what, "%.120s", path);
    else
        snprintf(what, sizeof what, "port %u", (unsigned)port);
    bool pending;
    int fd = path ? dial_path(path, &pending) : dial_port((uint16_t)port, &pending);
    if (fd < 0) {
        answer_error(w, f->stream, errno, what);
        return;
    }
    struct job *j = job_new(CONNECTION);
    struct stream *s = j ? job_stream(j, w, f->stream) : NULL;
    if (!s) {
        shut(&fd);
        if (j)
            job_free(j);
        answer_error(w, f->stream, EAGAIN, what);
        return;
    }
    s->input = true;
    take_socket(j, fd);
    j->dialed = pending ? (uint16_t)port : 0;
    stream_open(s, NULL);
}
