/* Users of the image, and starting a process as one of them. */
#ifndef COPPICE_SPAWN_H
#define COPPICE_SPAWN_H

#include "base.h"

#include <sys/resource.h>

/* ---- accounts.c: /etc/passwd and /etc/group, without a name service ---- */

struct account {
    uid_t uid;
    gid_t gid;
    size_t group_count;
    gid_t *groups;
    char *name, *home, *shell; /* name: NULL if no user has the uid */
};

int account_find(const char *user, struct account *a); /* "", name, uid, name:group, uid:gid; 0 or an errno */
void account_free(struct account *a);                  /* in any case */

/* ---- spawn.c ---- */

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

struct spawn {
    char **argv, **env;
    const char *cwd;
    bool cwd_optional; /* use "/" if it is missing */
    const struct account *account;
    int in, out, err;
    bool tty;
    const char *group;  /* directory of a cgroup; NULL: the agent's own */
    bool inside;        /* the child has begun in it */
    int error;          /* errno of the failed step */
    const char *failed; /* the name of that step */
};

struct strings { /* a vector of strings that ends with NULL, for execve */
    char **items;
    size_t count, capacity;
};

bool strings_add(struct strings *s, char *item);
void strings_free(struct strings *s); /* frees the vector, not its strings */
void strings_free_all(struct strings *s);
bool env_set(struct strings *env, char *assignment); /* replaces an assignment to the same name */
const char *env_get(const struct strings *env, const char *name);
bool env_defaults(struct strings *env, const struct account *a, const char *term, struct strings *made); /* lists the added strings in `made`, too */
pid_t spawn(struct spawn *s); /* -1 with `error` and `failed` */
int pidfd_of(pid_t pid);
extern rlim_t spawn_files; /* soft limit on the descriptors of a process; 0: the agent's own */
int exit_code_of(int status); /* 128+n for signal n */

/* ---- process.c: the machine's process, the image's, as the command PROCESS_ID ---- */

struct reply;
int process_start(struct spawn *s, const char *user); /* with its output on the console; 0 or an errno, with `s->failed` if a step has a name */
void process_report(struct reply *r);                 /* its pid, and its end if it has ended */

/* ---- program.c ---- */

/* Run a program as root. 0 or an errno; then `said` has what failed, with the end of its output. */
int run_and_wait(char **argv, char **env, int timeout_ms, char *said, size_t capacity);

#endif
