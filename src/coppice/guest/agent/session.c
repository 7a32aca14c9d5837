/* A session port's worker: one session at a time, one request per session. */
#include "agent.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#define GRACE_MS 500
#define DYING_MAX 16

/* ---- process groups of sessions that ended under them ---- */

/* The leader is not reaped before its group is killed: until then its number is not given to anybody else. */
static struct {
    pid_t group;
    int64_t kill_at;
} dying[DYING_MAX];
static size_t dying_count;

static void finish(size_t i)
{
    kill(-dying[i].group, SIGKILL);
    while (waitpid(dying[i].group, NULL, 0) < 0 && errno == EINTR) {
    }
    dying[i] = dying[--dying_count];
}

void dying_add(pid_t group)
{
    if (dying_count == DYING_MAX)
        finish(0);
    kill(-group, SIGHUP);
    kill(-group, SIGCONT);
    dying[dying_count].group = group;
    dying[dying_count++].kill_at = now_ms() + GRACE_MS;
}

int64_t dying_tick(void)
{
    if (dying_count == 0)
        return 0;
    int64_t now = now_ms(), next = 0;
    for (size_t i = dying_count; i-- > 0;) {
        if (dying[i].kill_at <= now)
            finish(i);
    }
    for (size_t i = 0; i < dying_count; i++) {
        if (!next || dying[i].kill_at < next)
            next = dying[i].kill_at;
    }
    return next;
}

/* ---- data from the host, within a window ---- */

bool window_spend(uint32_t *window, uint32_t size)
{
    if (size > *window)
        return false;
    *window -= size;
    return true;
}

bool window_return(struct wire *w, uint32_t *window, uint32_t *owed, uint32_t size, bool now)
{
    *owed += size;
    if (*owed == 0 || (!now && *owed < WINDOW_SIZE / 4))
        return true;
    uint8_t credit[4];
    store_u32(credit, *owed);
    if (!wire_put(w, WINDOW, credit, sizeof credit))
        return false; /* no room: it stays owed */
    *window += *owed;
    *owed = 0;
    return true;
}

bool upload_more(struct upload *u)
{
    struct frame f;
    window_return(u->wire, &u->window, &u->owed, 0, false);
    while (!u->eof && wire_recv(u->wire, &f)) {
        if (f.type == DATA_EOF) {
            u->eof = true;
        } else if (f.type != DATA || !window_spend(&u->window, f.size)) {
            wire_error(u->wire, EPROTO, "a frame of type %u breaks the protocol", f.type);
            u->wire->over = true;
        } else if (f.size > 0) {
            u->data = f.payload;
            u->size = f.size;
            u->owed += f.size; /* told with the next call: by then these bytes are used up */
            return true;
        }
    }
    return false;
}

/* ---- the session ---- */

static void run(struct wire *w, struct shared *shared)
{
    struct frame f;
    do {
        if (!wire_recv(w, &f))
            return;
    } while (!wire_assemble(w, &f));
    switch (f.type) {
    case EXEC:
        exec_run(w, &f, shared);
        break;
    case FILE_READ:
        file_read(w, &f);
        break;
    case FILE_WRITE:
        file_write(w, &f);
        break;
    case FILE_STAT:
        file_stat(w, &f);
        break;
    case TAR_OUT:
        tar_out(w, &f);
        break;
    case TAR_IN:
        tar_in(w, &f);
        break;
    default:
        wire_error(w, ENOSYS, "this agent knows no request %u", f.type);
    }
    wire_drain(w);
}

void session_serve(struct wire *w, struct shared *shared, int port)
{
    for (;;) {
        while (!wire_open_session(w)) {
            if (w->closed && dying_tick() == 0)
                exit(0);
            wire_wait(w, NULL, 0, 0);
        }
        shared->active[port] = 1;
        run(w, shared);
        w->over = true;
        shared->active[port] = 0;
    }
}
