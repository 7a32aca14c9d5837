/* Jobs: whatever a request leaves running. A host's streams show them, and feed them. */
#ifndef COPPICE_JOBS_H
#define COPPICE_JOBS_H

#include "output.h"
#include "wire.h"

#define WINDOW_SIZE 65536    /* bytes of input that the host may send ahead */
#define CREDIT_SIZE 262144   /* bytes of output that a new stream of the host takes */
#define KEPT_SIZE 262144     /* default bytes of output that a command keeps */
#define ID_SIZE 65           /* of a command, with its end */
#define JOBS_MAX 1024
#define DETACHED 4 /* flag of EXEC */
#define PROCESS_ID "main"    /* id of the machine's process, as a command */

enum job_kind {
    COMMAND,    /* EXEC: it goes on without a stream */
    HELPER,     /* a process of the agent's own that moves files */
    CONNECTION, /* a socket of the guest */
    ANSWER,     /* a reply that waits for space */
};

struct payload {
    size_t size;
    uint8_t data[];
};

struct job;

struct stream {
    struct stream *next;
    struct wire *wire;
    struct job *job;
    uint16_t id;
    bool output;     /* the host wants the output */
    bool input;      /* the host may send input */
    uint32_t credit; /* bytes of output that the host still takes */
    struct cursor cursor;
    uint64_t dropped; /* bytes before it that were dropped, and of which the host has not been told */
    bool eof_told;   /* of a connection */
    struct payload *first; /* STARTED, not sent yet */
    uint8_t final;   /* type of an early last frame, 0: the job's own */
    struct payload *last;
};

struct job {
    struct job *next;
    enum job_kind kind;
    struct stream *streams;
    pid_t pid; /* 0: none */
    int in, out, err; /* -1: closed */
    int terminal;     /* open to the end: closing it would hang up a command that has closed its side and is about to end */
    bool exited, ending;
    bool forgotten; /* nobody will ask for its end */
    bool lasting;   /* it is never forgotten: the machine's process */
    int status, error;
    int64_t quiet_at, timeout_at, kill_at; /* 0: never */
    size_t slot;                           /* of its three descriptors among those that are polled */
    struct output output;
    size_t kept;
    struct reply *reply; /* what a helper has said so far: a type, and a payload */
    uint8_t final;       /* type of the last frame; 0: not finished */
    struct payload *last;
    /* input */
    uint8_t *input;
    size_t start, end;
    uint32_t window, owed;
    uint16_t dialed;        /* the port of a connection that is not made; 0: it is made */
    bool in_eof, end_given; /* the host's input has ended; the end was passed on to the command */
    bool fed;               /* the command has got input; `last_byte` was its end */
    uint8_t last_byte;
    /* a command */
    char id[ID_SIZE];
    struct payload *about; /* its fields in LIST */
    bool tty, timed_out, limited;
    bool detached; /* no client's end concerns it: it was started so, or its last client left it */
    uint64_t ended_ns;
    char group[64]; /* path of its cgroup; empty: none */
};

/* ---- table.c ---- */

struct payload *payload_of(const struct reply *r); /* NULL: no memory */
struct job *job_new(enum job_kind kind); /* NULL: there are too many, or no memory */
struct stream *job_stream(struct job *j, struct wire *w, uint16_t id);
void job_free(struct job *j);
void job_finish(struct job *j, uint8_t final, const struct reply *last);
void job_end(struct job *j, int signal); /* this signal to all of its processes, SIGKILL soon after */
struct job *job_find(const char *id);    /* a command */
bool job_describe(struct job *j, const char *id, uint64_t flags, const char *user, char **argv); /* for LIST; false: no memory */
struct job *job_first(void);
void jobs_rotate(void);
void stream_open(struct stream *s, const struct reply *started); /* STARTED is sent before all else */
void stream_close(struct stream *s, uint8_t final, const struct reply *last);
void stream_free(struct stream *s);
void stream_violation(struct stream *s, const struct frame *f);
void answer(struct wire *w, uint16_t stream, uint8_t type, const struct reply *reply);
void answer_error(struct wire *w, uint16_t stream, int error, const char *what); /* what: strerror is added */

/* ---- streams.c ---- */

bool streams_take(struct wire *w, const struct frame *f); /* a frame for an open stream; false: there is none */
void streams_drop(struct wire *w);                        /* the session is over */
void streams_send(void);
uint64_t job_lag(const struct job *j);      /* bytes of records that the slowest stream has not sent yet */
bool job_wants_output(const struct job *j); /* without a stream, the oldest output is dropped for it */

/* ---- jobs.c ---- */

bool jobs_reaped(pid_t pid, int status);
void jobs_step(void);         /* whatever can be done without waiting, output to the hosts last */
void jobs_end_attached(void); /* all but detached commands: the clients of the others are not this machine's */
bool jobs_alive(void);        /* any process runs */
int64_t jobs_deadline(void);

struct polls {
    struct pollfd *fds;
    size_t count, capacity;
};

void polls_add(struct polls *p, int fd, short events);
void jobs_poll(struct polls *p);
void jobs_ready(const struct polls *p);

/* ---- input.c ---- */

void input_take(struct stream *s, const struct frame *f);
void input_feed(struct job *j);

/* ---- group.c: the processes that a command has started ---- */

extern const char *group_root; /* NULL: this kernel has no cgroups of version 2 */
bool group_make(struct job *j);
void group_ahead(void); /* make the next command's now */
int group_limit(struct job *j, uint64_t memory, uint64_t processes); /* 0 or an errno */
bool group_was_short(const struct job *j);                           /* the memory limit has killed a process */
void group_kill(const struct job *j, int signal);
void group_remove(struct job *j);

/* ---- requests ---- */

#define IMAGE_ENV_MAX (256u << 10)

struct image { /* defaults of commands */
    char cwd[PATH_MAX];
    char user[256];
    uint32_t env_size;
    char env[IMAGE_ENV_MAX]; /* assignments, each terminated by a zero */
};

void exec_run(struct wire *w, const struct frame *f, const struct image *image);
void exec_attach(struct wire *w, const struct frame *f);
void exec_list(struct wire *w, const struct frame *f);
void exec_forget(const struct frame *f);
void exec_finish(struct job *j);
void socket_connect(struct wire *w, const struct frame *f);
void socket_connected(struct job *j); /* or refused */
bool request_start(struct wire *w, const struct frame *f); /* false: no helper does this */

#endif
