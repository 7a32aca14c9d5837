/* Start a process for a request that may block or last. */
#define _GNU_SOURCE
#include "helper.h"
#include "jobs.h"

#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

static void sync_disks(const struct frame *f)
{
    (void)f;
    sync();
    warm_programs(); /* what asks for a sync captures next */
}

typedef void (*request)(const struct frame *);

static request request_of(uint8_t type)
{
    switch (type) {
    case FILE_READ: return file_read;
    case FILE_WRITE: return file_write;
    case FILE_STAT: return file_stat;
    case FILE_LIST: return file_list;
    case FILE_MKDIR: return file_mkdir;
    case FILE_MOVE: return file_move;
    case FILE_REMOVE: return file_remove;
    case FILE_WATCH: return file_watch;
    case TREE_OUT: return tree_out;
    case TREE_IN: return tree_in;
    case SYNC: return sync_disks;
    default: return NULL;
    }
}

static _Noreturn void work(request run, const struct frame *f, int in, int out, int reply)
{
    helper_begin(in, out, reply);
    run(f);
    helper_ok(NULL);
}

static void not_blocking(int fd)
{
    fcntl(fd, F_SETFL, O_NONBLOCK);
}

bool request_start(struct wire *w, const struct frame *f)
{
    request run = request_of(f->type);
    if (!run)
        return false;
    int in[2] = {-1, -1}, out[2] = {-1, -1}, reply[2] = {-1, -1};
    struct job *j = job_new(HELPER);
    struct stream *s = j ? job_stream(j, w, f->stream) : NULL;
    bool good = s && pipe2(in, O_CLOEXEC) == 0 && pipe2(out, O_CLOEXEC) == 0 && pipe2(reply, O_CLOEXEC) == 0;
    pid_t pid = good ? fork() : -1;
    if (pid == 0)
        work(run, f, in[0], out[1], reply[1]);
    int error = errno;
    shut(&in[0]);
    shut(&out[1]);
    shut(&reply[1]);
    if (pid < 0) {
        shut(&in[1]);
        shut(&out[0]);
        shut(&reply[0]);
        if (j)
            job_free(j);
        answer_error(w, f->stream, j ? error : EAGAIN, "request");
        return true;
    }
    s->input = f->type == FILE_WRITE || f->type == TREE_IN;
    j->pid = pid;
    j->in = in[1];
    j->out = out[0];
    j->err = reply[0];
    not_blocking(j->in);
    not_blocking(j->out);
    not_blocking(j->err);
    if (!s->input)
        shut(&j->in);
    return true;
}
