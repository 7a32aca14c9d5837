/* Frames over one port: a bounded buffer each way, and one place where the agent waits.
 *
 * A virtio port that no host is connected to is readable (at its end) and hung up all the time, so it is watched edge-triggered:
 * the agent sleeps until something changes. The kernel learns of connections by another queue than that of the data: when a host is
 * quickly followed by another, the hang-up may be missed, or be seen only after the new one's HELLO. So HELLO is what really ends a
 * session, and a hang-up counts only if it lasts.
 */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <unistd.h>

#define END_BYTE 0xA5
#define HANG_UP_MS 1000 /* how long a hang-up must last */
#define UNSEEN_MS 10000 /* the same before this session's host was seen connected: the kernel may learn of it after its first bytes, by another
                         * queue, and the vCPU of an emulated guest may stand still in between while its clock goes on */

static const uint8_t magic[8] = {'C', 'O', 'P', 'P', 'I', 'C', 'E', '1'};

enum source { FROM_FD, FROM_LISTENER, FROM_END_SIGNAL };

static bool watch(struct wire *w, int fd, enum source source, uint32_t events)
{
    struct epoll_event event = {.events = events, .data.u32 = source};
    return fd < 0 || epoll_ctl(w->epoll, EPOLL_CTL_ADD, fd, &event) == 0;
}

static bool attach(struct wire *w, int fd)
{
    w->fd = fd;
    w->readable = w->writable = true;
    w->in_start = w->in_end = 0;
    return fd < 0 || (fcntl(fd, F_SETFL, O_NONBLOCK | O_RDWR) == 0 &&
                      watch(w, fd, FROM_FD, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET));
}

bool wire_open(struct wire *w, int fd, int listener, bool is_port, int end_signal)
{
    w->listener = listener;
    w->is_port = is_port;
    w->end_signal = end_signal;
    w->over = true;
    w->epoll = epoll_create1(EPOLL_CLOEXEC);
    return w->epoll >= 0 && attach(w, fd) && watch(w, listener, FROM_LISTENER, EPOLLIN) &&
           watch(w, end_signal, FROM_END_SIGNAL, EPOLLIN);
}

static void hang_up(struct wire *w)
{
    w->over = true;
    w->hang_up_at = 0;
    w->readable = false;
    w->in_start = w->in_end = 0; /* the rest of a frame will not come from another host */
    if (!w->is_port)
        w->closed = w->listener < 0;
}

static void drop_parts(struct wire *w)
{
    free(w->parts);
    w->parts = NULL;
    w->parts_size = 0;
}

/* ---- in ---- */

/* 1: a frame, 0: more bytes are needed, -1: this is not the protocol. */
static int parse(struct wire *w, struct frame *f)
{
    while (w->in_start < w->in_end && w->in[w->in_start] == 0)
        w->in_start++;
    size_t have = w->in_end - w->in_start;
    if (have == 0)
        w->in_start = w->in_end = 0;
    if (have < FRAME_OVERHEAD - 1)
        return 0;
    uint8_t *at = w->in + w->in_start;
    uint32_t size = load_u32(at + 1);
    if (size > HOST_PAYLOAD_MAX) {
        w->in_start++; /* a frame may begin at any byte after this one */
        return -1;
    }
    if (have < size + FRAME_OVERHEAD)
        return 0;
    w->in_start += size + FRAME_OVERHEAD;
    if (at[5 + size] != END_BYTE)
        return -1;
    *f = (struct frame){.type = at[0], .size = size, .payload = at + 5};
    return 1;
}

/* Read once. True: there may be more to parse. */
static bool fill(struct wire *w)
{
    if (!w->readable || w->fd < 0)
        return false;
    if (w->in_start > 0) {
        memmove(w->in, w->in + w->in_start, w->in_end - w->in_start);
        w->in_end -= w->in_start;
        w->in_start = 0;
    }
    ssize_t n = read(w->fd, w->in + w->in_end, sizeof w->in - w->in_end);
    if (n < 0 && errno == EINTR)
        return true;
    if (n == 0 && w->is_port && (w->over || !w->hang_up_at || now_ms() < w->hang_up_at)) {
        w->readable = false;
        if (!w->over && !w->hang_up_at)
            w->hang_up_at = now_ms() + (w->seen ? HANG_UP_MS : UNSEEN_MS);
        return false;
    }
    if (n == 0 || (n < 0 && errno != EAGAIN)) {
        hang_up(w);
        return false;
    }
    w->hang_up_at = 0;
    w->seen |= n < 0; /* nothing to read, and not at its end: there is a host */
    w->readable = n > 0;
    if (n > 0)
        w->in_end += (size_t)n;
    return n > 0;
}

static bool is_hello(struct wire *w, const struct frame *f)
{
    if (f->type != HELLO || f->size != sizeof magic + NONCE_SIZE || memcmp(f->payload, magic, sizeof magic) != 0)
        return false;
    memcpy(w->nonce, f->payload + sizeof magic, NONCE_SIZE);
    w->hello = w->over = true;
    return true;
}

bool wire_take(struct wire *w, struct frame *f)
{
    while (!w->over) {
        int found = parse(w, f);
        if (found > 0 && f->type != HELLO)
            return true;
        if (found > 0 && !is_hello(w, f))
            w->over = true;
        if (found < 0)
            w->over = true;
        if (found == 0 && !fill(w))
            return false;
    }
    return false;
}

bool wire_recv(struct wire *w, struct frame *f)
{
    while (!wire_take(w, f)) {
        wire_flush(w);
        if (w->over)
            return false;
        wire_wait(w, NULL, 0, 0);
    }
    return true;
}

bool wire_open_session(struct wire *w)
{
    struct frame f;
    while (!w->hello) {
        if (!w->over)
            return true;
        int found = parse(w, &f);
        if (found > 0)
            is_hello(w, &f);
        else if (found == 0 && !fill(w))
            return false;
    }
    /* An order to end the session that was open before this HELLO is not meant for the new one. */
    struct signalfd_siginfo ignored;
    while (w->end_signal >= 0 && read(w->end_signal, &ignored, sizeof ignored) > 0) {
    }
    w->hello = w->over = w->seen = false;
    w->hang_up_at = 0;
    w->out_start = w->out_end = 0;
    drop_parts(w);
    struct reply r = {0};
    reply_text(&r, 1, AGENT_VERSION);
    reply_int(&r, 2, CAPABILITIES);
    uint8_t payload[sizeof magic + NONCE_SIZE + 64];
    memcpy(payload, magic, sizeof magic);
    memcpy(payload + sizeof magic, w->nonce, NONCE_SIZE);
    memcpy(payload + sizeof magic + NONCE_SIZE, r.data, r.size);
    wire_put(w, HELLO_ACK, payload, sizeof magic + NONCE_SIZE + r.size);
    return true;
}

bool wire_assemble(struct wire *w, struct frame *f)
{
    if (f->type != PART && w->parts_size == 0) {
        drop_parts(w);
        return true;
    }
    if (f->type == PART && f->size == 0)
        return false;
    uint8_t *grown = f->size > REQUEST_MAX - w->parts_size ? NULL : realloc(w->parts, w->parts_size + f->size + 1);
    if (!grown) {
        w->over = true;
        return false;
    }
    memcpy(grown + w->parts_size, f->payload, f->size);
    w->parts = grown;
    w->parts_size += f->size;
    if (f->type == PART)
        return false;
    f->payload = grown;
    f->size = (uint32_t)w->parts_size;
    w->parts_size = 0; /* the buffer lives until the next request */
    return true;
}

/* ---- out ---- */

size_t wire_room(const struct wire *w)
{
    size_t free_bytes = sizeof w->out - (w->out_end - w->out_start);
    return free_bytes < FRAME_OVERHEAD ? 0 : free_bytes - FRAME_OVERHEAD;
}

uint8_t *wire_reserve(struct wire *w)
{
    if (w->out_start > 0 && sizeof w->out - w->out_end < CHUNK + FRAME_OVERHEAD) {
        memmove(w->out, w->out + w->out_start, w->out_end - w->out_start);
        w->out_end -= w->out_start;
        w->out_start = 0;
    }
    return w->out + w->out_end + 5;
}

void wire_commit(struct wire *w, uint8_t type, size_t size)
{
    uint8_t *at = w->out + w->out_end;
    at[0] = type;
    store_u32(at + 1, (uint32_t)size);
    at[5 + size] = END_BYTE;
    w->out_end += size + FRAME_OVERHEAD;
}

bool wire_put(struct wire *w, uint8_t type, const void *payload, size_t size)
{
    if (size > wire_room(w))
        return false;
    uint8_t *at = wire_reserve(w);
    if (size > 0)
        memcpy(at, payload, size);
    wire_commit(w, type, size);
    wire_flush(w);
    return true;
}

void wire_flush(struct wire *w)
{
    while (w->out_start < w->out_end && w->writable && w->fd >= 0 && !w->closed) {
        ssize_t n = write(w->fd, w->out + w->out_start, w->out_end - w->out_start);
        w->seen |= n > 0;
        if (n > 0)
            w->out_start += (size_t)n;
        else if (n < 0 && errno == EAGAIN)
            w->writable = false;
        else if (n == 0 || errno != EINTR) {
            hang_up(w);
            return;
        }
    }
    if (w->out_start == w->out_end)
        w->out_start = w->out_end = 0;
}

/* Frames that come while the agent has something to say are not expected, and not wanted. HELLO ends the session as always. */
static bool make_room(struct wire *w, size_t size)
{
    struct frame ignored;
    for (;;) {
        wire_flush(w);
        while (wire_take(w, &ignored)) {
        }
        if (w->over)
            return false;
        if (wire_room(w) >= size)
            return true;
        wire_wait(w, NULL, 0, 0);
    }
}

bool wire_send(struct wire *w, uint8_t type, const void *payload, size_t size)
{
    return make_room(w, size) && wire_put(w, type, payload, size);
}

bool wire_drain(struct wire *w)
{
    return make_room(w, sizeof w->out - FRAME_OVERHEAD);
}

void wire_error(struct wire *w, int error, const char *format, ...)
{
    char text[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    struct reply r = {0};
    reply_int(&r, 1, (uint64_t)error);
    reply_text(&r, 2, text);
    wire_send(w, ERROR, r.data, r.size);
}

/* ---- waiting ---- */

static void accept_connection(struct wire *w)
{
    int fd = accept4(w->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0)
        return;
    if (w->fd >= 0)
        close(w->fd);
    w->over = true;
    w->out_start = w->out_end = 0;
    if (!attach(w, fd)) {
        close(fd);
        w->fd = -1;
    }
}

static void note(struct wire *w, const struct epoll_event *event)
{
    struct signalfd_siginfo ignored;
    switch ((enum source)event->data.u32) {
    case FROM_FD:
        w->readable |= (event->events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
        w->writable |= (event->events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) != 0;
        break;
    case FROM_LISTENER:
        accept_connection(w);
        break;
    case FROM_END_SIGNAL:
        if (read(w->end_signal, &ignored, sizeof ignored) > 0)
            w->over = true;
        break;
    }
}

void wire_wait(struct wire *w, struct pollfd *extra, nfds_t count, int64_t deadline)
{
    int64_t kill_at = dying_tick();
    if (kill_at && (!deadline || kill_at < deadline))
        deadline = kill_at;
    if (w->hang_up_at && (!deadline || w->hang_up_at < deadline))
        deadline = w->hang_up_at;
    int timeout = -1;
    if (deadline) {
        int64_t left = deadline - now_ms();
        timeout = left < 0 ? 0 : left > INT_MAX ? INT_MAX : (int)left;
    }
    struct epoll_event events[4];
    int ready;
    if (count == 0) {
        ready = epoll_wait(w->epoll, events, 4, timeout);
    } else {
        struct pollfd all[8] = {{.fd = w->epoll, .events = POLLIN}};
        memcpy(all + 1, extra, count * sizeof *extra);
        ready = poll(all, count + 1, timeout);
        for (nfds_t i = 0; i < count; i++)
            extra[i].revents = ready > 0 ? all[i + 1].revents : 0;
        ready = ready > 0 && all[0].revents ? epoll_wait(w->epoll, events, 4, 0) : 0;
    }
    for (int i = 0; i < ready; i++)
        note(w, &events[i]);
    w->readable |= w->hang_up_at && now_ms() >= w->hang_up_at; /* look again, for the last time */
}
