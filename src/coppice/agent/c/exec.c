/* EXEC, ATTACH, LIST: commands on a terminal or pipes. A command goes on without a host, and the
 * agent keeps its latest output and its end. */
#define _GNU_SOURCE
#include "jobs.h"
#include "spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define KEPT_MAX (64u << 20)

enum { WITH_TTY = 1, WITH_STDIN = 2, TIMED_OUT = 1, OUT_OF_MEMORY = 2, WITHOUT_OUTPUT = 1, WITH_INPUT = 2 };

struct request {
    const char *id;
    struct strings argv, env;
    const char *cwd, *user, *term;
    uint64_t flags, rows, cols, timeout_ms, kept, memory, processes;
    struct account account;
    struct strings defaults;
    char who[300];
};

/* ---- the request ---- */

static bool is_id(const char *id)
{
    size_t size = strlen(id);
    return size > 0 && size < ID_SIZE && strspn(id, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_.-") == size;
}

static int read_request(struct request *r, const struct frame *f, const struct image *image)
{
    bool fits = true;
    for (const char *e = image->env; e < image->env + image->env_size; e += strlen(e) + 1)
        fits &= env_set(&r->env, (char *)e);
    struct tlv t = tlv_read(f);
    while (tlv_next(&t)) {
        switch (t.tag) {
        case 1: fits &= strings_add(&r->argv, tlv_text(&t)); break;
        case 2: fits &= env_set(&r->env, tlv_text(&t)); break;
        case 3: r->cwd = tlv_text(&t); break;
        case 4: r->user = tlv_text(&t); break;
        case 5: r->flags = tlv_int(&t); break;
        case 6: r->rows = tlv_int(&t); break;
        case 7: r->cols = tlv_int(&t); break;
        case 8: r->timeout_ms = tlv_int(&t); break;
        case 9: r->term = tlv_text(&t); break;
        case 10: r->id = tlv_text(&t); break;
        case 11: r->kept = tlv_int(&t); break;
        case 12: r->memory = tlv_int(&t); break;
        case 13: r->processes = tlv_int(&t); break;
        }
    }
    if (!fits || t.bad || r->argv.count == 0 || !r->id || !is_id(r->id) || r->kept > KEPT_MAX)
        return EINVAL;
    return job_find(r->id) || strcmp(r->id, PROCESS_ID) == 0 ? EEXIST : 0;
}

/* ---- starting ---- */

static bool open_terminal(struct request *r, struct spawn *s, struct job *j)
{
    int unlock = 0;
    struct winsize size = {.ws_row = r->rows < USHRT_MAX ? (unsigned short)r->rows : USHRT_MAX, .ws_col = r->cols < USHRT_MAX ? (unsigned short)r->cols : USHRT_MAX};
    int master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (master < 0 || ioctl(master, TIOCSPTLCK, &unlock) < 0 ||
        (s->in = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC)) < 0) {
        shut(&master);
        return false;
    }
    ioctl(master, TIOCSWINSZ, &size);
    if (fchown(s->in, r->account.uid, (gid_t)-1) < 0 && geteuid() == 0)
        say("the terminal keeps its owner: %s", strerror(errno));
    s->out = s->err = s->in;
    s->tty = j->tty = true;
    j->out = master;
    j->terminal = fcntl(master, F_DUPFD_CLOEXEC, 3);
    j->in = r->flags & WITH_STDIN ? fcntl(master, F_DUPFD_CLOEXEC, 3) : -1;
    return true;
}

static bool open_pipes(struct request *r, struct spawn *s, struct job *j)
{
    int in[2] = {-1, -1}, out[2] = {-1, -1}, err[2] = {-1, -1};
    if (r->flags & WITH_STDIN ? pipe2(in, O_CLOEXEC) < 0 : (in[0] = open("/dev/null", O_RDONLY | O_CLOEXEC)) < 0)
        return false;
    bool opened = pipe2(out, O_CLOEXEC) == 0 && pipe2(err, O_CLOEXEC) == 0;
    s->in = in[0], s->out = out[1], s->err = err[1];
    j->in = in[1], j->out = out[0], j->err = err[0];
    /* Let the user reopen /dev/stdin and the like, which needs permission. Every user may open
     * /dev/null. */
    if (opened && r->account.uid != geteuid())
        opened = (in[1] < 0 || fchown(in[0], r->account.uid, (gid_t)-1) == 0) && fchown(out[1], r->account.uid, (gid_t)-1) == 0 &&
                 fchown(err[1], r->account.uid, (gid_t)-1) == 0;
    return opened;
}

static int start(struct request *r, struct job *j, const struct image *image, const char **failed)
{
    struct spawn s = {.argv = r->argv.items, .account = &r->account, .in = -1, .out = -1, .err = -1};
    s.cwd = r->cwd ? r->cwd : *image->cwd ? image->cwd : "/";
    s.cwd_optional = !r->cwd;
    const char *user = r->user ? r->user : image->user;
    snprintf(r->who, sizeof r->who, "user %s", user);
    *failed = r->who;
    int error = account_find(user, &r->account);
    if (error)
        return error;
    *failed = "environment";
    const char *term = r->flags & WITH_TTY ? (r->term ? r->term : "xterm") : r->term;
    if (!env_defaults(&r->env, &r->account, term, &r->defaults))
        return ENOMEM;
    s.env = r->env.items;
    *failed = "limits";
    s.group = group_make(j) ? j->group : NULL;
    error = r->memory || r->processes ? group_limit(j, r->memory, r->processes) : 0;
    if (error)
        return error;
    *failed = "pipes";
    bool opened = r->flags & WITH_TTY ? open_terminal(r, &s, j) : open_pipes(r, &s, j);
    error = opened ? 0 : errno;
    if (opened) {
        j->pid = spawn(&s);
        error = s.error;
        *failed = s.failed;
    }
    shut(&s.in);
    if (!s.tty) {
        shut(&s.out);
        shut(&s.err);
    }
    for (int *fd = (int[]){j->in, j->out, j->err, -2}; !error && *fd != -2; fd++) {
        if (*fd >= 0)
            fcntl(*fd, F_SETFL, O_NONBLOCK);
    }
    if (error)
        j->pid = 0;
    return error;
}

static void started(struct stream *s)
{
    const struct job *j = s->job;
    struct reply r = {0};
    reply_int(&r, 1, (uint64_t)j->pid);
    reply_int(&r, 2, j->window);
    reply_int(&r, 3, s->cursor.offset - s->dropped);
    stream_open(s, &r);
}

void exec_run(struct wire *w, const struct frame *f, const struct image *image)
{
    struct request r = {0};
    const char *failed = "request";
    int error = read_request(&r, f, image);
    struct job *j = error ? NULL : job_new(COMMAND);
    struct stream *s = j ? job_stream(j, w, f->stream) : NULL;
    if (!error)
        error = s ? start(&r, j, image, &failed) : EAGAIN;
    if (!error && !job_describe(j, r.id, r.flags, r.user ? r.user : "", r.argv.items))
        error = ENOMEM;
    if (error) {
        if (j)
            job_free(j);
        answer_error(w, f->stream, error, failed);
    } else {
        j->kept = r.kept ? r.kept : KEPT_SIZE;
        j->timeout_at = r.timeout_ms ? deadline_in(r.timeout_ms) : 0;
        s->input = r.flags & WITH_STDIN;
        j->detached = r.flags & DETACHED;
        started(s);
        if (r.flags & DETACHED)
            stream_close(s, OK, NULL);
    }
    account_free(&r.account);
    strings_free(&r.argv);
    strings_free(&r.env);
    strings_free_all(&r.defaults);
}

void exec_finish(struct job *j)
{
    struct reply r = {0};
    if (j->ending)
        group_kill(j, SIGKILL);
    reply_int(&r, 1, (uint64_t)exit_code_of(j->status));
    reply_int(&r, 2, (j->timed_out ? TIMED_OUT : 0) | (group_was_short(j) ? OUT_OF_MEMORY : 0));
    reply_int(&r, 3, WIFSIGNALED(j->status) ? (uint64_t)WTERMSIG(j->status) : 0);
    j->ended_ns = clock_now();
    job_finish(j, EXIT, &r);
    if (j->lasting)
        say(WIFSIGNALED(j->status) ? "the machine's process was ended by signal %d" : "the machine's process exited with status %d",
            WIFSIGNALED(j->status) ? WTERMSIG(j->status) : WEXITSTATUS(j->status));
}

/* ---- later ---- */

static const char *id_of(const struct frame *f, uint64_t *offset, uint64_t *flags)
{
    const char *id = NULL;
    struct tlv t = tlv_read(f);
    while (tlv_next(&t)) {
        switch (t.tag) {
        case 1: id = tlv_text(&t); break;
        case 2: *offset = tlv_int(&t); break;
        case 3: *flags = tlv_int(&t); break;
        }
    }
    return t.bad ? NULL : id;
}

void exec_attach(struct wire *w, const struct frame *f)
{
    uint64_t offset = 0, flags = 0;
    const char *id = id_of(f, &offset, &flags);
    struct job *j = id ? job_find(id) : NULL;
    int error = !id ? EINVAL : !j ? ESRCH : 0;
    for (struct stream *other = j && flags & WITH_INPUT ? j->streams : NULL; other; other = other->next)
        error = other->input ? EBUSY : error;
    struct stream *s = error ? NULL : job_stream(j, w, f->stream);
    if (!s) {
        answer_error(w, f->stream, error ? error : ENOMEM, id ? id : "request");
        return;
    }
    s->dropped = output_seek(&j->output, offset, &s->cursor);
    s->output = !(flags & WITHOUT_OUTPUT);
    s->input = flags & WITH_INPUT;
    if (s->input) {
        j->window = WINDOW_SIZE - (uint32_t)(j->end - j->start);
        j->owed = 0;
    }
    started(s);
}

void exec_list(struct wire *w, const struct frame *f)
{
    struct job *list = job_new(ANSWER);
    struct stream *s = list ? job_stream(list, w, f->stream) : NULL;
    if (!s) {
        if (list)
            job_free(list);
        answer_error(w, f->stream, EAGAIN, "request");
        return;
    }
    for (struct job *j = job_first(); j; j = j->next) {
        uint8_t *space = j->kind == COMMAND ? output_reserve(&list->output, SIZE_MAX / 4) : NULL;
        if (!space)
            continue;
        struct reply r = {0};
        memcpy(r.data, j->about->data, r.size = j->about->size);
        reply_int(&r, 6, j->output.first);
        reply_int(&r, 7, j->output.total);
        reply_int(&r, 8, (j->streams ? 1 : 0));
        if (j->final) {
            reply_bytes(&r, 9, j->last->data, j->last->size);
            reply_int(&r, 11, j->ended_ns);
        }
        struct reply entry = {0};
        reply_bytes(&entry, 1, r.data, r.size);
        memcpy(space, entry.data, entry.size);
        output_commit(&list->output, DATA, entry.size);
    }
    job_finish(list, OK, NULL);
}

void exec_forget(const struct frame *f)
{
    uint64_t ignored = 0;
    const char *id = id_of(f, &ignored, &ignored);
    struct job *j = id ? job_find(id) : NULL;
    if (j && j->final && !j->streams && !j->lasting)
        job_free(j);
}
