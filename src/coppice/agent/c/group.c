/* All processes that a command has started: a control group of version 2. A kernel without gets the
 * next best: the processes of the command's session, and their descendants. */
#define _GNU_SOURCE
#include "jobs.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define WALKED_MAX 4096

const char *group_root;
static char next[sizeof((struct job *)0)->group]; /* made ahead; "": none */

static int write_to(const char *directory, const char *name, const char *value)
{
    char path[160];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    int error = fd < 0 || !write_all(fd, value, strlen(value)) ? errno : 0;
    if (fd >= 0)
        close(fd);
    return error;
}

/* Remove the groups of finished commands. The kernel keeps those with a process. */
static void sweep(void)
{
    DIR *root = opendir(group_root);
    struct dirent *entry;
    while (root && (entry = readdir(root)) != NULL) {
        if (entry->d_type == DT_DIR && *entry->d_name != '.')
            unlinkat(dirfd(root), entry->d_name, AT_REMOVEDIR);
    }
    if (root)
        closedir(root);
}

void group_ahead(void)
{
    static unsigned long number;
    if (!group_root || *next)
        return;
    if (number % 64 == 0)
        sweep();
    mkdir(group_root, 0755);
    snprintf(next, sizeof next, "%.40s/%lu", group_root, ++number);
    if (mkdir(next, 0755) < 0 && errno != EEXIST)
        *next = 0;
}

bool group_make(struct job *j)
{
    group_ahead();
    memcpy(j->group, next, sizeof next);
    *next = 0;
    return *j->group && (mkdir(j->group, 0755) == 0 || errno == EEXIST); /* the guest's root may have removed it */
}

int group_limit(struct job *j, uint64_t memory, uint64_t processes)
{
    char parent[64], value[32];
    if (!*j->group)
        return EOPNOTSUPP;
    snprintf(parent, sizeof parent, "%.*s", (int)(strrchr(group_root, '/') - group_root), group_root);
    write_to(parent, "cgroup.subtree_control", "+memory +pids");
    int error = write_to(group_root, "cgroup.subtree_control", "+memory +pids");
    snprintf(value, sizeof value, "%llu", (unsigned long long)memory);
    if (!error && memory)
        error = write_to(j->group, "memory.max", value);
    snprintf(value, sizeof value, "%llu", (unsigned long long)processes);
    if (!error && processes)
        error = write_to(j->group, "pids.max", value);
    if (!error && memory) {
        write_to(j->group, "memory.swap.max", "0");
        write_to(j->group, "memory.oom.group", "1");
    }
    j->limited = memory;
    return error ? EOPNOTSUPP : 0;
}

bool group_was_short(const struct job *j)
{
    char path[96], text[512];
    if (!j->limited)
        return false;
    snprintf(path, sizeof path, "%s/memory.events", j->group);
    const char *killed = read_file(path, text, sizeof text) < 0 ? NULL : strstr(text, "oom_kill ");
    return killed && atoi(killed + strlen("oom_kill ")) > 0;
}

void group_remove(struct job *j)
{
    if (*j->group)
        rmdir(j->group);
}

/* ---- signals ---- */

static bool signal_group(const struct job *j, int signal)
{
    char path[96];
    size_t size;
    if (!*j->group)
        return false;
    if (signal == SIGKILL && write_to(j->group, "cgroup.kill", "1") == 0)
        return true;
    snprintf(path, sizeof path, "%s/cgroup.procs", j->group);
    char *text = load_file(path, &size);
    for (char *at = text; at && *at; at = strchr(at, '\n') + 1)
        kill((pid_t)strtol(at, NULL, 10), signal);
    free(text);
    return text;
}

struct process {
    pid_t pid, parent, session;
};

static size_t all_processes(struct process *found)
{
    size_t count = 0;
    DIR *directory = opendir("/proc");
    struct dirent *entry;
    while (directory && count < WALKED_MAX && (entry = readdir(directory)) != NULL) {
        char path[300], text[1024];
        struct process p = {.pid = atoi(entry->d_name)};
        snprintf(path, sizeof path, "/proc/%s/stat", entry->d_name);
        const char *end = p.pid > 0 && read_file(path, text, sizeof text) > 0 ? strrchr(text, ')') : NULL;
        if (end && sscanf(end + 1, " %*c %d %*d %d", &p.parent, &p.session) == 2)
            found[count++] = p;
    }
    if (directory)
        closedir(directory);
    return count;
}

static void signal_tree(pid_t leader, int signal)
{
    struct process *found = calloc(WALKED_MAX, sizeof *found);
    bool *ours = calloc(WALKED_MAX, sizeof *ours);
    size_t count = found && ours ? all_processes(found) : 0;
    for (bool grown = true; grown;) {
        grown = false;
        for (size_t i = 0; i < count; i++) {
            bool is = found[i].pid == leader || found[i].session == leader;
            for (size_t n = 0; n < count && !is && !ours[i]; n++)
                is = ours[n] && found[n].pid == found[i].parent;
            grown |= is && !ours[i];
            ours[i] |= is;
        }
    }
    for (size_t i = 0; i < count; i++) {
        if (ours[i])
            kill(found[i].pid, signal);
    }
    free(found);
    free(ours);
}

void group_kill(const struct job *j, int signal)
{
    if (j->kind == HELPER)
        kill(j->pid, signal);
    else if (j->pid && !signal_group(j, signal))
        signal_tree(j->pid, signal);
}
