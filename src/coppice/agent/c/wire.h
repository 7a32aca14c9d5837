/* Frames over one connection, and the fields of their payloads: docs/agent-protocol.md. */
#ifndef COPPICE_WIRE_H
#define COPPICE_WIRE_H

#include "base.h"

/* ---- wire.c: frames over one connection ---- */

#define AGENT_VERSION "2.0.0"
#define PROTOCOL 2
#define PORT_COUNT 8

enum frame_type {
    HELLO = 1, HELLO_ACK = 2, OK = 3, ERROR = 4, PART = 5, PING = 6, PONG = 7, FORGET = 8,
    HEALTH = 16, IDENTITY = 17, FREEZE = 18, THAW = 19, POWEROFF = 20, SYNC = 21, CLOCK = 22, SHARED_RANDOM = 23,
    EXEC = 32, STDIN = 33, STDIN_EOF = 34, SIGNAL = 35, RESIZE = 36, ATTACH = 37, LIST = 38, LEAVE = 39, END = 40,
    STARTED = 48, STDOUT = 49, STDERR = 50, WINDOW = 51, EXIT = 52, DROPPED = 53,
    FILE_READ = 64, FILE_WRITE = 65, FILE_STAT = 66, TREE_OUT = 67, TREE_IN = 68, CONNECT = 69,
    FILE_LIST = 70, FILE_MKDIR = 71, FILE_MOVE = 72, FILE_REMOVE = 73, FILE_WATCH = 74,
    DATA = 80, DATA_EOF = 81,
};

#define FRAME_HEADER 5                /* type, stream, length */
#define FRAME_OVERHEAD 6              /* and the end byte */
#define HOST_FRAME_MAX 4096           /* from the host: one read of a virtio port, and one page */
#define HOST_PAYLOAD_MAX (HOST_FRAME_MAX - FRAME_OVERHEAD)
#define REQUEST_MAX (4u << 20)        /* a request with its PART frames */
#define CHUNK (32768 - FRAME_OVERHEAD) /* payload of a full frame to the host: one write to a port takes at most 32 KiB */
#define NONCE_SIZE 16

struct frame {
    uint8_t type;
    uint16_t stream;
    uint32_t size;
    uint8_t *payload; /* in the wire's buffer: valid until the next frame is taken */
};

/* A virtio port stays open, and reads as ended while no host is connected. A stream socket ends
 * with its connection. If there is a `listener`, the newest connection replaces the one before. */
struct wire {
    int fd;       /* -1: no host has connected yet */
    int listener; /* -1: none */
    int epoll;
    bool is_port;
    bool readable, writable; /* the latest state from the edge-triggered epoll */
    bool closed;             /* a socket without a listener has ended: no more input can come */
    bool over;               /* there is no session; cleared by a HELLO */
    int64_t hang_up_at;      /* the port reads as ended; when that counts as a hang-up, 0: it does not read as ended */
    bool seen; /* this session's host was seen connected */
    size_t in_start, in_end, out_start, out_end;
    uint8_t *parts; /* PART frames of the next request */
    size_t parts_size;
    uint8_t in[HOST_FRAME_MAX] __attribute__((aligned(HOST_FRAME_MAX)));
    uint8_t out[2 * 32768 + 4096];
};

bool wire_open(struct wire *w, int fd, int listener, bool is_port);
bool wire_take(struct wire *w, struct frame *f); /* take the next frame if it has arrived; HELLO opens a session, and is answered already */
void wire_event(struct wire *w);                 /* `epoll` is readable: take over the new state */
int64_t wire_deadline(const struct wire *w);     /* when wire_take has more to do without an event; 0: never */
size_t wire_room(const struct wire *w);          /* bytes of payload that fit into one more frame now */
bool wire_put(struct wire *w, uint8_t type, uint16_t stream, const void *payload, size_t size); /* queue; false: no space */
void wire_flush(struct wire *w);
void wire_violation(struct wire *w, const char *what); /* end the session, and say why */

/* ---- tlv.c ---- */

struct tlv {
    uint8_t *at, *end;
    uint8_t next_tag;
    bool bad;
    uint8_t tag;
    uint32_t size;
    uint8_t *value; /* followed by a terminating zero */
};

struct tlv tlv_read(const struct frame *f);
bool tlv_next(struct tlv *t);        /* false at the end, or with `bad` if the list is malformed */
uint64_t tlv_int(struct tlv *t);     /* sets `bad` unless the value is 8 bytes */
char *tlv_text(struct tlv *t);       /* sets `bad` if the text contains a zero byte */

struct reply {
    size_t size;
    uint8_t data[2 * PATH_MAX + 1024];
};

void reply_bytes(struct reply *r, uint8_t tag, const void *value, size_t size); /* left out if it does not fit */
void reply_text(struct reply *r, uint8_t tag, const char *value);
void reply_int(struct reply *r, uint8_t tag, uint64_t value);
void reply_error(struct reply *r, int error, const char *format, ...) __attribute__((format(printf, 3, 4))); /* the payload of ERROR */
uint32_t load_u32(const uint8_t *p);
void store_u32(uint8_t *p, uint32_t value);

#endif
