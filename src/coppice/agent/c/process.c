/* The machine's process. It is a command like others, whose output goes to the console. */
#include "jobs.h"
#include "spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

int process_start(struct spawn *s, const char *user)
{
    struct job *j = job_find(PROCESS_ID);
    if (j && !j->final)
        return EBUSY;
    if (j)
        job_free(j);
    j = job_new(COMMAND);
    if (!j)
        return ENOMEM;
    j->lasting = j->detached = true;
    s->in = open("/dev/null", O_RDONLY | O_CLOEXEC);
    s->out = s->err = STDERR_FILENO;
    s->group = group_make(j) ? j->group : NULL;
    pid_t pid = spawn(s);
    close(s->in);
    if (pid > 0)
        j->pid = pid;
    if (pid > 0 && job_describe(j, PROCESS_ID, DETACHED, user, s->argv))
        return 0;
    job_free(j);
    return pid < 0 ? s->error : ENOMEM;
}

void process_report(struct reply *r)
{
    const struct job *j = job_find(PROCESS_ID);
    reply_int(r, 4, j ? (uint64_t)j->pid : 0);
    reply_int(r, 5, j && j->final ? (uint64_t)exit_code_of(j->status) + 1 : 0);
    if (j && j->final && WIFSIGNALED(j->status))
        reply_int(r, 8, (uint64_t)WTERMSIG(j->status));
    if (j && j->final)
        reply_int(r, 9, j->ended_ns);
}
