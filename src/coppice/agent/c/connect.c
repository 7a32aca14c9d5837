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

static int dial(const void *address, socklen_t size, int family)
{
    int fd = socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0 || connect(fd, address, size) == 0)
        return fd;
    int error = errno;
    socklen_t length = sizeof error;
    /* A port of this machine without a server has refused already. */
    if (error == EINPROGRESS && getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &length) == 0 && error == 0)
        return fd;
    shut(&fd);
    errno = error;
    return -1;
}

static int dial_port(uint16_t port)
{
    struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = htons(port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = htons(port), .sin6_addr = IN6ADDR_LOOPBACK_INIT};
    int fd = dial(&four, sizeof four, AF_INET);
    int error = errno;
    if (fd < 0 && error == ECONNREFUSED)
        fd = dial(&six, sizeof six, AF_INET6);
    errno = error;
    return fd;
}

static int dial_path(const char *path)
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
    return dial(&address, size, AF_UNIX);
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
    int fd = path ? dial_path(path) : dial_port((uint16_t)port);
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
    j->in = fd;
    j->out = fcntl(fd, F_DUPFD_CLOEXEC, 3);
    stream_open(s, NULL);
}
