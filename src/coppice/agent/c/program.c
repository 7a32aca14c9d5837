/* Run one program of the image to its end, as root. */
#define _GNU_SOURCE
#include "spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define OUTPUT_QUOTED 600 /* bytes; the host shows 1000 of a message */

/* Append the end of a program's output to the message, on one line. */
static void quote_output(int log, char *said, size_t capacity)
{
    char tail[OUTPUT_QUOTED];
    off_t size = lseek(log, 0, SEEK_END);
    ssize_t got = pread(log, tail, sizeof tail, size > (off_t)sizeof tail ? size - (off_t)sizeof tail : 0);
    while (got > 0 && tail[got - 1] == '\n')
        got--;
    if (got <= 0)
        return;
    size_t used = strlen(said);
    used += (size_t)snprintf(said + used, capacity - used, "; the end of its output: ");
    for (ssize_t n = 0; n < got && used < capacity - 4; n++)
        used += (size_t)snprintf(said + used, capacity - used, tail[n] == '\n' ? " | " : "%c", tail[n]);
}

static void copy_to_console(int log)
{
    char data[4096];
    ssize_t size;
    for (off_t at = 0; (size = pread(log, data, sizeof data, at)) > 0; at += size)
        write_all(STDERR_FILENO, data, (size_t)size);
}

/* The output goes to a file, from which the console and the message get it. A pipe would end what the
 * program leaves running. */
int run_and_wait(char **argv, char **env, int timeout_ms, char *said, size_t capacity)
{
    static const struct account root = {.name = "root", .home = "/root", .shell = "/bin/sh"};
    char path[64];
    snprintf(path, sizeof path, "/run/coppice/%.40s.log", strrchr(argv[0], '/') + 1);
    int null = open("/dev/null", O_RDONLY | O_CLOEXEC);
    int log = open(path, O_RDWR | O_CREAT | O_TRUNC | O_APPEND | O_NOFOLLOW | O_CLOEXEC, 0600);
    int output = log < 0 ? STDERR_FILENO : log;
    struct spawn s = {
        .argv = argv, .env = env, .cwd = "/", .account = &root, .in = null, .out = output, .err = output,
    };
    pid_t pid = spawn(&s);
    close(null);
    int error = s.error, status = 0;
    if (pid < 0) {
        snprintf(said, capacity, "%s cannot be started: %s", argv[0], strerror(error));
    } else {
        struct pollfd ended = {.fd = pidfd_of(pid), .events = POLLIN};
        error = poll(&ended, 1, timeout_ms) == 1 ? 0 : ETIMEDOUT;
        if (error)
            kill(-pid, SIGKILL);
        close(ended.fd);
        while (waitpid(pid, &status, 0) < 0 && errno == EINTR) {
        }
        if (error)
            snprintf(said, capacity, "%s did not end within %d s", argv[0], timeout_ms / 1000);
        else if (WIFSIGNALED(status))
            snprintf(said, capacity, "%s was ended by signal %d", argv[0], WTERMSIG(status));
        else if (status)
            snprintf(said, capacity, "%s ended with exit code %d", argv[0], WEXITSTATUS(status));
        error = error ? error : status ? ECANCELED : 0;
    }
    if (log >= 0) {
        if (error)
            quote_output(log, said, capacity);
        copy_to_console(log);
        close(log);
    }
    return error;
}
