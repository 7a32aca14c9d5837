/* Users and groups from the image's own files. */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define FILE_MAX (16 << 20)

/* Calls `entry` with the colon-separated fields of each line, until it returns true. */
struct table {
    const char *path;
    int columns;
    bool (*entry)(char **field, void *context);
};

static int scan(const struct table *table, void *context)
{
    FILE *file = fopen(table->path, "re");
    if (!file)
        return errno == ENOENT || errno == ENOTDIR ? 0 : errno;
    char *line = NULL;
    size_t capacity = 0, total = 0;
    ssize_t size;
    while ((size = getline(&line, &capacity, file)) > 0 && (total += (size_t)size) < FILE_MAX) {
        line[strcspn(line, "\n")] = 0;
        char *field[8] = {0}, *rest = line;
        int count = 0;
        while (count < table->columns && rest)
            field[count++] = strsep(&rest, ":");
        if (count == table->columns && table->entry(field, context))
            break;
    }
    free(line);
    fclose(file);
    return 0;
}

static bool number(const char *text, uint32_t *value)
{
    char *end;
    errno = 0;
    unsigned long long n = strtoull(text, &end, 10);
    if (text[0] < '0' || text[0] > '9' || *end || errno || n >= UINT32_MAX)
        return false;
    *value = (uint32_t)n;
    return true;
}

struct wanted {
    const char *name;
    bool by_number, found;
    uint32_t id;
    struct account *account;
};

static void keep(char *to, size_t capacity, const char *value)
{
    if (strlen(value) < capacity)
        strcpy(to, value);
}

static bool passwd_entry(char **field, void *context)
{
    struct wanted *w = context;
    uint32_t uid, gid;
    if (!number(field[2], &uid) || !number(field[3], &gid))
        return false;
    if (w->by_number ? uid != w->id : strcmp(field[0], w->name) != 0)
        return false;
    w->account->uid = uid;
    w->account->gid = gid;
    keep(w->account->name, sizeof w->account->name, field[0]);
    keep(w->account->home, sizeof w->account->home, field[5][0] ? field[5] : "/");
    keep(w->account->shell, sizeof w->account->shell, field[6][0] ? field[6] : "/bin/sh");
    return w->found = true;
}

static bool group_entry(char **field, void *context)
{
    struct wanted *w = context;
    w->found = strcmp(field[0], w->name) == 0 && number(field[2], &w->id);
    return w->found;
}

static bool member_entry(char **field, void *context)
{
    struct account *a = context;
    uint32_t gid;
    if (!number(field[2], &gid) || gid == a->gid)
        return false;
    char *members = field[3], *member;
    while ((member = strsep(&members, ",")) != NULL) {
        if (strcmp(member, a->name) == 0) {
            a->groups[a->group_count++] = gid;
            break;
        }
    }
    return a->group_count == GROUPS_MAX;
}

static const struct table passwd = {"/etc/passwd", 7, passwd_entry};
static const struct table group = {"/etc/group", 4, group_entry};
static const struct table members = {"/etc/group", 4, member_entry};

int account_find(const char *user, struct account *a)
{
    *a = (struct account){.home = "/", .shell = "/bin/sh"};
    char name[256];
    if (strlen(user) >= sizeof name)
        return EINVAL;
    strcpy(name, *user ? user : "0");
    char *group_name = strchr(name, ':');
    if (group_name)
        *group_name++ = 0;
    struct wanted w = {.name = name, .account = a};
    w.by_number = number(name, &w.id);
    int error = scan(&passwd, &w);
    if (error)
        return error;
    if (!w.found) {
        bool is_root = strcmp(name, "root") == 0;
        if (!w.by_number && !is_root)
            return ENOENT;
        a->uid = is_root ? 0 : w.id;
        if (a->uid == 0) {
            strcpy(a->name, "root");
            strcpy(a->home, "/root");
        }
    }
    if (group_name) {
        struct wanted g = {.name = group_name};
        if (!number(group_name, &g.id)) {
            error = scan(&group, &g);
            if (error || !g.found)
                return error ? error : ENOENT;
        }
        a->gid = g.id; /* a group that is asked for replaces all others, as container engines have it */
        return 0;
    }
    return a->name[0] ? scan(&members, a) : 0;
}
