/* The Coppice guest agent: PID 1 of every guest, and the guest's end of the protocol in docs/agent-protocol.md.
 *
 * One process per port. PID 1 serves the control port; each session port has a worker, and a session is straight-line
 * code in its worker. No threads, no name service, no allocation that the host could make unbounded.
 */
#ifndef COPPICE_AGENT_H
#define COPPICE_AGENT_H

#include <limits.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define AGENT_VERSION "1.0.0"
#define CAPABILITIES 1u /* bit 0: archives with holes are understood */
#define PORT_COUNT 8 /* coppice.0 is the control port */

/* ---- clock.c: small things on which the rest stands ---- */

int64_t now_ms(void); /* CLOCK_MONOTONIC */
int64_t now_us(void);
void pause_ms(int ms);
void say(const char *format, ...) __attribute__((format(printf, 1, 2))); /* one line to the console */
bool write_all(int fd, const void *data, size_t size);                   /* errno is set where it fails */
ssize_t read_file(const char *path, char *buffer, size_t capacity);      /* terminated; -1 with errno */

/* ---- wire.c: frames over one port ---- */

enum frame_type {
    HELLO = 1, HELLO_ACK = 2, OK = 3, ERROR = 4, PART = 5,
    HEALTH = 16, IDENTITY = 17, FREEZE = 18, THAW = 19, POWEROFF = 20, SYNC = 21,
    EXEC = 32, STDIN = 33, STDIN_EOF = 34, SIGNAL = 35, RESIZE = 36,
    STARTED = 48, STDOUT = 49, STDERR = 50, WINDOW = 51, EXIT = 52,
    FILE_READ = 64, FILE_WRITE = 65, FILE_STAT = 66, TAR_OUT = 67, TAR_IN = 68,
    DATA = 80, DATA_EOF = 81,
};

#define FRAME_OVERHEAD 6              /* type, length, end byte */
#define HOST_FRAME_MAX 4096           /* from the host: what a virtio port yields at once, and a page here */
#define HOST_PAYLOAD_MAX (HOST_FRAME_MAX - FRAME_OVERHEAD)
#define REQUEST_MAX (4u << 20)        /* of a request with its PART frames */
#define CHUNK (32768 - FRAME_OVERHEAD) /* payload of a full frame to the host: the kernel's port writes at most 32 KiB at once */
#define WINDOW_SIZE 65536
#define NONCE_SIZE 16

struct frame {
    uint8_t type;
    uint32_t size;
    uint8_t *payload; /* inside of the wire's buffer: valid until the next frame is taken */
};

/* A virtio port stays open for good, and reads as ended while no host is connected. A stream socket ends with its connection;
 * where there is a `listener`, the newest connection replaces the one before. */
struct wire {
    int fd;       /* -1: nobody has connected yet */
    int listener; /* -1: none */
    int epoll;
    int end_signal; /* signalfd by which PID 1 ends a session; -1: none */
    bool is_port;
    bool readable, writable; /* what the edge-triggered epoll said last */
    bool closed;             /* a socket without a listener that has ended: nothing can come any more */
    bool over;               /* there is no session; cleared when a HELLO is answered */
    bool hello;              /* a HELLO was taken and has not been answered yet */
    int64_t hang_up_at;      /* the port reads as ended; when to believe it, 0: it does not */
    bool seen; /* the host of this session, connected */
    uint8_t nonce[NONCE_SIZE];
    size_t in_start, in_end, out_start, out_end;
    uint8_t *parts; /* PART frames of the request that is coming */
    size_t parts_size;
    uint8_t in[HOST_FRAME_MAX] __attribute__((aligned(HOST_FRAME_MAX)));
    uint8_t out[2 * 32768 + 4096];
};

bool wire_open(struct wire *w, int fd, int listener, bool is_port, int end_signal);
bool wire_open_session(struct wire *w);              /* answer a HELLO if there is one; true: a session is open */
bool wire_take(struct wire *w, struct frame *f);     /* the next frame, if it is there already */
bool wire_recv(struct wire *w, struct frame *f);     /* wait for the next frame; false: the session is over */
bool wire_assemble(struct wire *w, struct frame *f); /* put the PART frames before a request; false: it was one, or too many */
void wire_wait(struct wire *w, struct pollfd *extra, nfds_t count, int64_t deadline); /* until something happens; 0: no deadline */
size_t wire_room(const struct wire *w); /* payload that fits into one more frame now */
uint8_t *wire_reserve(struct wire *w);  /* where that payload goes */
void wire_commit(struct wire *w, uint8_t type, size_t size);
bool wire_put(struct wire *w, uint8_t type, const void *payload, size_t size);  /* queue without waiting */
bool wire_send(struct wire *w, uint8_t type, const void *payload, size_t size); /* wait for room */
void wire_flush(struct wire *w);
bool wire_drain(struct wire *w); /* until all is written; false: the session is over */
void wire_error(struct wire *w, int error, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* ---- tlv.c ---- */

struct tlv {
    uint8_t *at, *end;
    uint8_t next_tag;
    bool bad;
    uint8_t tag;
    uint32_t size;
    uint8_t *value; /* terminated by a zero that is not part of it */
};

struct tlv tlv_read(const struct frame *f);
bool tlv_next(struct tlv *t);        /* false at the end, or with `bad` where the list is malformed */
uint64_t tlv_int(struct tlv *t);     /* sets `bad` unless the value is 8 bytes */
char *tlv_text(struct tlv *t);       /* sets `bad` where the text holds a zero byte */

struct reply {
    size_t size;
    uint8_t data[8192];
};

void reply_bytes(struct reply *r, uint8_t tag, const void *value, size_t size); /* what does not fit is left out */
void reply_text(struct reply *r, uint8_t tag, const char *value);
void reply_int(struct reply *r, uint8_t tag, uint64_t value);
uint32_t load_u32(const uint8_t *p);
void store_u32(uint8_t *p, uint32_t value);

/* ---- accounts.c: /etc/passwd and /etc/group, without a name service ---- */

#define GROUPS_MAX 64

struct account {
    uid_t uid;
    gid_t gid;
    size_t group_count;
    gid_t groups[GROUPS_MAX];
    char name[64], home[256], shell[256];
};

int account_find(const char *user, struct account *a); /* "", name, uid, name:group, uid:gid; 0 or an errno */

/* ---- spawn.c ---- */

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

struct spawn {
    char **argv, **env;
    const char *cwd;
    bool cwd_optional; /* "/" will do */
    const struct account *account;
    int in, out, err;
    bool tty;
    int error;          /* errno of what failed */
    const char *failed; /* and what it was */
};

struct strings { /* a vector of strings that ends with NULL, as execve wants it */
    char **items;
    size_t count, capacity;
};

bool strings_add(struct strings *s, char *item);
bool env_set(struct strings *env, char *assignment); /* replaces an assignment to the same name */
const char *env_get(const struct strings *env, const char *name);
bool env_defaults(struct strings *env, const struct account *a, const char *term, char (*space)[320]);
pid_t spawn(struct spawn *s); /* -1 with `error` and `failed` */
int pidfd_of(pid_t pid);
int exit_code_of(int status); /* 128+n for signal n */

/* ---- session.c, exec.c, files.c, tar_out.c, tar_in.c: the session ports ---- */

#define IMAGE_ENV_MAX (256u << 10)

struct shared { /* one mapping of PID 1 and all workers */
    volatile uint32_t active[PORT_COUNT]; /* a session is open on the port */
    char cwd[PATH_MAX];                   /* of the image */
    char user[256];
    uint32_t env_size;
    char env[IMAGE_ENV_MAX]; /* assignments, each with its zero */
};

void session_serve(struct wire *w, struct shared *shared, int port) __attribute__((noreturn));
void exec_run(struct wire *w, const struct frame *request, struct shared *shared);
void file_read(struct wire *w, const struct frame *request);
void file_write(struct wire *w, const struct frame *request);
void file_stat(struct wire *w, const struct frame *request);
void tar_out(struct wire *w, const struct frame *request);
void tar_in(struct wire *w, const struct frame *request);

struct upload { /* DATA frames from the host, as a stream with flow control */
    struct wire *wire;
    uint32_t window, owed; /* what the host may still send; what it has not been told yet */
    const uint8_t *data;
    size_t size;
    bool eof;
};

bool upload_more(struct upload *u); /* the next bytes into data and size; false at the end, or when the session is over */
bool window_spend(uint32_t *window, uint32_t size);
bool window_return(struct wire *w, uint32_t *window, uint32_t *owed, uint32_t size, bool now);

int make_parents(char *path); /* of a path that may be written to meanwhile; 0 or an errno */
void dying_add(pid_t group);  /* SIGHUP now, SIGKILL in 500 ms */
int64_t dying_tick(void);     /* kill what is due; when to call again, 0: nothing left */

/* ---- boot.c, volumes.c, modules.c, ports.c: from the kernel to the ports ---- */

int boot(void); /* mounts, modules, root; returns a descriptor of the overlay's file system. Does not return without a root */
void load_modules(const char *directory);
void mount_kernel_filesystems(void);
void link_up_loopback(void);

#define VOLUMES_MAX 8 /* MAX_VOLUMES of the host */

struct volume {
    int number; /* which of the machine's volumes */
    bool readonly;
    const char *path;
};

bool is_volume(char letter); /* whether /dev/vdX is one */
int volume_mount(const struct volume *v); /* 0 or an errno */
void volume_unmount(const char *path);

struct port {
    char path[64]; /* of a virtio port; empty: none */
    int listener;  /* of a vsock port; -1: none */
};

bool ports_find(struct port ports[PORT_COUNT]); /* false: there is no control port */
int port_open(const struct port *port);
void sys_write(const char *path, const char *value);

/* ---- control.c, identity.c, etc.c, network.c, power.c: the control port ---- */

struct machine {
    struct wire wire;
    struct shared *shared;
    int overlay;   /* descriptor of the overlay's file system; -1: none */
    int random;    /* /dev/urandom */
    int children;  /* signalfd of SIGCHLD; -1: none */
    bool confined; /* serving a test: only what harms nobody */
    struct port ports[PORT_COUNT];
    pid_t workers[PORT_COUNT];
    int64_t worker_started[PORT_COUNT];
    int64_t respawn_at;
    int64_t thaw_at; /* 0: not frozen */
    uint64_t serial;
    char *mounted[VOLUMES_MAX]; /* paths of volumes, in the order in which they were mounted */
    size_t mounted_count;
    pid_t process; /* the image's */
    bool process_ended;
    int process_status;
};

void control_serve(struct machine *m) __attribute__((noreturn));
void start_workers(struct machine *m);
void reap(struct machine *m);
int freeze(struct machine *m, uint64_t timeout_ms);
int thaw(struct machine *m);
bool identity(struct machine *m, const struct frame *request); /* answers by itself */
void power_off(struct machine *m, uint64_t grace_ms);

extern const char boot_id_path[];
void mount_own_files(void);
int put_file(const char *path, const char *data, size_t size, mode_t mode); /* 0 or an errno, all four */
int put_line(const char *path, const char *text, mode_t mode);
int put_hosts(const char *hostname);
int remove_file(const char *path); /* which may not be there */

struct network {
    const uint8_t *mac; /* 6 bytes, or NULL */
    const char *address, *gateway;
    uint32_t mtu; /* 0: as it is */
};

int network_set(const struct network *n); /* 0 or an errno */

#endif
