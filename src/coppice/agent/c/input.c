/* The host's input for a job: data with a window, signals, the size of the terminal. */
#include "jobs.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <termios.h>
#include <unistd.h>

static void end_input(struct job *j)
{
    if (j->kind == CONNECTION && j->in >= 0)
        shutdown(j->in, SHUT_WR);
    shut(&j->in);
}

/* ---- the end of the input of a terminal ---- */

/* Return whether the terminal holds back an unfinished line; `last_byte` is the last byte that it got. */
static bool line_is_open(const struct job *j, const struct termios *mode)
{
    if (!j->fed || j->last_byte == '\n' || (j->last_byte == '\r' && mode->c_iflag & ICRNL))
        return false;
    const cc_t *ends = mode->c_cc;
    return j->last_byte == _POSIX_VDISABLE || (j->last_byte != ends[VEOF] && j->last_byte != ends[VEOL] && j->last_byte != ends[VEOL2]);
}

static bool has_buffer(struct job *j)
{
    if (!j->input)
        j->input = malloc(WINDOW_SIZE);
    return j->input;
}

/* Signal the end of input to the terminal, after all input. In an unfinished line, the first
 * end-of-file character only passes the line to the reader, and a second one is the end. A program
 * in raw mode would read the character as data, so it gets none. */
static void end_of_input(struct job *j)
{
    struct termios mode;
    j->end_given = true;
    if (!j->tty || j->in < 0 || tcgetattr(j->in, &mode) < 0 || !(mode.c_lflag & ICANON) || mode.c_cc[VEOF] == _POSIX_VDISABLE)
        return;
    if (!has_buffer(j))
        return;
    j->start = 0;
    j->end = line_is_open(j, &mode) ? 2 : 1;
    memset(j->input, mode.c_cc[VEOF], j->end);
}

/* ---- frames ---- */

static bool take_data(struct stream *s, const struct frame *f)
{
    struct job *j = s->job;
    if (!s->input || j->in_eof || f->size > j->window)
        return false;
    j->window -= f->size;
    if (j->in < 0) { /* no reader: discard it */
        j->owed += f->size;
        return true;
    }
    if (!has_buffer(j))
        return false;
    if (f->size > WINDOW_SIZE - j->end) {
        memmove(j->input, j->input + j->start, j->end - j->start);
        j->end -= j->start;
        j->start = 0;
    }
    if (f->size > WINDOW_SIZE - j->end)
        return false;
    memcpy(j->input + j->end, f->payload, f->size);
    j->end += f->size;
    return true;
}

static bool resize(const struct job *j, const struct frame *f)
{
    if (f->size != 8)
        return false;
    uint32_t rows = load_u32(f->payload), columns = load_u32(f->payload + 4);
    struct winsize size = {.ws_row = rows < USHRT_MAX ? (unsigned short)rows : USHRT_MAX, .ws_col = columns < USHRT_MAX ? (unsigned short)columns : USHRT_MAX};
    if (j->terminal >= 0)
        ioctl(j->terminal, TIOCSWINSZ, &size);
    return true;
}

void input_take(struct stream *s, const struct frame *f)
{
    struct job *j = s->job;
    bool command = j->kind == COMMAND, good = false;
    if (f->type == (command ? STDIN : DATA)) {
        good = take_data(s, f);
    } else if (f->type == (command ? STDIN_EOF : DATA_EOF)) {
        good = true;
        j->in_eof |= s->input; /* otherwise the input was empty from the beginning */
    } else if (command && f->type == SIGNAL) {
        good = f->size == 4 && load_u32(f->payload) > 0 && load_u32(f->payload) <= 64;
        if (good && !j->exited)
            kill(-j->pid, (int)load_u32(f->payload));
    } else if (command && f->type == RESIZE) {
        good = resize(j, f);
    }
    if (!good)
        stream_violation(s, f);
}

/* ---- feeding ---- */

static void feed_waiting(struct job *j)
{
    while (j->in >= 0 && j->start < j->end) {
        ssize_t n = write(j->in, j->input + j->start, j->end - j->start);
        if (n < 0 && (errno == EAGAIN || errno == EINTR || errno == ENOTCONN))
            return;
        if (n <= 0) { /* the reader has closed it, or the connection is broken */
            if (n < 0 && errno != EPIPE && j->kind == CONNECTION)
                j->error = errno; /* the kernel tells it only once; the other direction just ends */
            n = (ssize_t)(j->end - j->start);
            shut(&j->in);
        }
        j->start += (size_t)n;
        j->fed = true;
        j->last_byte = j->input[j->start - 1];
        if (!j->end_given) /* otherwise the agent made these characters, not the host */
            j->owed += (uint32_t)n;
    }
    if (j->in < 0 && j->start < j->end)
        j->owed += (uint32_t)(j->end - j->start);
    j->start = j->end = 0;
    free(j->input);
    j->input = NULL;
}

void input_feed(struct job *j)
{
    if (j->dialed)
        return;
    if (j->start < j->end)
        feed_waiting(j);
    if (j->in_eof && !j->end_given && j->end == 0) {
        end_of_input(j);
        feed_waiting(j);
    }
    if (j->end_given && j->end == 0)
        end_input(j);
    if (j->owed == 0 || (j->end > 0 && j->owed < WINDOW_SIZE / 4))
        return;
    for (struct stream *s = j->streams; s; s = s->next) {
        uint8_t credit[4];
        store_u32(credit, j->owed);
        if (s->input && !s->final && wire_put(s->wire, WINDOW, s->id, credit, sizeof credit)) {
            j->window += j->owed;
            j->owed = 0;
            return;
        }
    }
}
