/* Frames over one connection: a bounded buffer each way, and no waiting.
 *
 * A virtio port without a connected host is always readable (at its end) and hung up. So it is
 * watched edge-triggered, and the agent sleeps until that changes. The kernel learns of connections
 * through another queue than of data. If one host quickly follows another, the hang-up may be
 * missed, or seen only after the new HELLO. So HELLO reliably ends a session, and a hang-up counts
 * only if it lasts. */
#define _GNU_SOURCE
#include "wire.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define END_BYTE 0xA5
#define HANG_UP_MS 1000 /* how long a hang-up must last */
#define UNSEEN_MS 10000 /* the same before this session's host was seen connected: the kernel may learn of it after its first bytes, by another
                         * queue, and the vCPU of an emulated guest may stand still in between while its clock goes on */

static const uint8_t magic[8] = {'C', 'O', 'P', 'P', 'I', 'C', 'E', '2'};

enum source { FROM_FD, FROM_LISTENER };

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

bool wire_open(struct wire *w, int fd, int listener, bool is_port)
{
    w->listener = listener;
    w->is_port = is_port;
    w->over = true;
    w->epoll = epoll_create1(EPOLL_CLOEXEC);
    return w->epoll >= 0 && attach(w, fd) && watch(w, listener, FROM_LISTENER, EPOLLIN);
}

static void hang_up(struct wire *w)
{
    w->over = true;
    w->hang_up_at = 0;
    w->readable = false;
    w->in_start = w->in_end = 0; /* another host will not send the rest of a frame */
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

static uint32_t load_u16(const uint8_t *p)
{
    return (uint32_t)p[0] | (uint32_t)p[1] << 8;
}

/* Parse. 1: a frame, 0: more bytes are needed, -1: a violation of the protocol. */
static int parse(struct wire *w, struct frame *f)
{
    while (w->in_start < w->in_end && w->in[w->in_start] == 0)
        w->in_start++;
    size_t have = w->in_end - w->in_start;
    if (have == 0)
        w->in_start = w->in_end = 0;
    if (have < FRAME_HEADER)
        return 0;
    uint8_t *at = w->in + w->in_start;
    uint32_t size = load_u16(at + 3);
    if (size > HOST_PAYLOAD_MAX)
        return -1;
    if (have < size + FRAME_OVERHEAD)
        return 0;
    if (at[FRAME_HEADER + size] != END_BYTE)
        return -1;
    w->in_start += size + FRAME_OVERHEAD;
    *f = (struct frame){.type = at[0], .stream = (uint16_t)load_u16(at + 1), .size = size, .payload = at + FRAME_HEADER};
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
    w->seen |= n < 0; /* nothing to read, but not at the end: a host is connected */
    w->readable = n > 0;
    if (n > 0)
        w->in_end += (size_t)n;
    return n > 0;
}

static bool is_hello(const struct frame *f)
{
    return f->type == HELLO && f->stream == 0 && f->size >= sizeof magic + NONCE_SIZE && memcmp(f->payload, magic, sizeof magic) == 0;
}

/* Without a session, look for a HELLO at every byte: anything may stand before it. */
static bool find_hello(struct wire *w, struct frame *f)
{
    for (;;) {
        uint8_t *from = w->in + w->in_start;
        uint8_t *found = memmem(from, w->in_end - w->in_start, magic, sizeof magic);
        if (!found) { /* keep what may be the beginning of one */
            size_t have = w->in_end - w->in_start, kept = FRAME_HEADER + sizeof magic - 1;
            w->in_start += have > kept ? have - kept : 0;
            return false;
        }
        size_t at = (size_t)(found - w->in);
        if (at >= w->in_start + FRAME_HEADER && w->in[at - FRAME_HEADER] == HELLO) {
            w->in_start = at - FRAME_HEADER;
            int parsed = parse(w, f);
            if (parsed == 0 || (parsed > 0 && is_hello(f)))
                return parsed > 0;
        }
        w->in_start = at + 1;
    }
}

static void open_session(struct wire *w, const struct frame *f)
{
    uint8_t payload[sizeof magic + NONCE_SIZE + 64];
    memcpy(payload, f->payload, sizeof magic + NONCE_SIZE);
    w->over = w->seen = false;
    w->hang_up_at = 0;
    w->out_start = w->out_end = 0;
    drop_parts(w);
    struct reply r = {0};
    reply_text(&r, 1, AGENT_VERSION);
    reply_int(&r, 2, PROTOCOL);
    reply_text(&r, 3, "limits");
    memcpy(payload + sizeof magic + NONCE_SIZE, r.data, r.size);
    wire_put(w, HELLO_ACK, 0, payload, sizeof magic + NONCE_SIZE + r.size);
}

/* Put the PART frames before a request. False: this was a PART, or there are too many. */
static bool assemble(struct wire *w, struct frame *f)
{
    if (f->type != PART && w->parts_size == 0) {
        drop_parts(w);
        return true;
    }
    if (f->type == PART && f->size == 0)
        return false;
    uint8_t *grown = f->size > REQUEST_MAX - w->parts_size ? NULL : realloc(w->parts, w->parts_size + f->size + 1);
    if (!grown) {
        wire_violation(w, "the request is too long");
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

bool wire_take(struct wire *w, struct frame *f)
{
    w->readable |= w->hang_up_at && now_ms() >= w->hang_up_at; /* read once more, to be sure */
    for (;;) {
        int found = w->over ? find_hello(w, f) : parse(w, f);
        if (found < 0) {
            wire_violation(w, "a frame is malformed");
        } else if (found > 0 && (w->over || f->type == HELLO)) {
            if (is_hello(f)) {
                open_session(w, f);
                return true;
            }
            wire_violation(w, "the HELLO is malformed");
        } else if (found > 0) {
            if (assemble(w, f))
                return true;
        } else if (!fill(w)) {
            return false;
        }
    }
}

/* ---- out ---- */

size_t wire_room(const struct wire *w)
{
    size_t free_bytes = sizeof w->out - (w->out_end - w->out_start);
    return free_bytes < FRAME_OVERHEAD ? 0 : free_bytes - FRAME_OVERHEAD;
}

bool wire_put(struct wire *w, uint8_t type, uint16_t stream, const void *payload, size_t size)
{
    if (w->over || size > wire_room(w))
        return false;
    if (sizeof w->out - w->out_end < size + FRAME_OVERHEAD) {
        memmove(w->out, w->out + w->out_start, w->out_end - w->out_start);
        w->out_end -= w->out_start;
        w->out_start = 0;
    }
    uint8_t *at = w->out + w->out_end;
    at[0] = type;
    at[1] = (uint8_t)stream;
    at[2] = (uint8_t)(stream >> 8);
    at[3] = (uint8_t)size;
    at[4] = (uint8_t)(size >> 8);
    if (size > 0)
        memcpy(at + FRAME_HEADER, payload, size);
    at[FRAME_HEADER + size] = END_BYTE;
    w->out_end += size + FRAME_OVERHEAD;
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

void wire_violation(struct wire *w, const char *what)
{
    struct reply r = {0};
    reply_error(&r, EPROTO, "%s", what);
    wire_put(w, ERROR, 0, r.data, r.size);
    wire_flush(w);
    w->over = true;
    drop_parts(w);
}

/* ---- events ---- */

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

void wire_event(struct wire *w)
{
    struct epoll_event events[4];
    int ready = epoll_wait(w->epoll, events, 4, 0);
    for (int i = 0; i < ready; i++) {
        if (events[i].data.u32 == FROM_LISTENER) {
            accept_connection(w);
            continue;
        }
        w->readable |= (events[i].events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0;
        w->writable |= (events[i].events & (EPOLLOUT | EPOLLHUP | EPOLLERR)) != 0;
    }
}

int64_t wire_deadline(const struct wire *w)
{
    return w->hang_up_at;
}
