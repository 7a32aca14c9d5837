/* Users and groups from the image's own files. */
#include "spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define FILE_MAX (16 << 20)

/* Call `entry` with the colon-separated fields of each line, until it returns true. */
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
    int error = 0;
    while ((size = getline(&line, &capacity, file)) > 0) {
        if ((total += (size_t)size) >= FILE_MAX) {
            error = EFBIG;
            break;
        }
        line[strcspn(line, "\n")] = 0;
        char *field[8] = {0}, *rest = line;
        int count = 0;
        while (count < table->columns && rest)
            field[count++] = strsep(&rest, ":");
        if (count == table->columns && table->entry(field, context))
            break;
    }
    if (!error && ferror(file))
        error = EIO;
    free(line);
    fclose(file);
    return error;
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
    bool by_number, found, lost; /* lost: out of memory */
    uint32_t id;
    struct account *account;
};

/* Replace a string by a copy of another. */
static bool keep(char **to, const char *value)
{
    free(*to);
    *to = strdup(value);
    return *to != NULL;
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
    w->lost = !keep(&w->account->name, field[0]) || !keep(&w->account->home, field[5][0] ? field[5] : "/") ||
              !keep(&w->account->shell, field[6][0] ? field[6] : "/bin/sh");
    return w->found = true;
}

static bool group_entry(char **field, void *context)
{
    struct wanted *w = context;
    w->found = strcmp(field[0], w->name) == 0 && number(field[2], &w->id);
    return w->found;
}

struct membership {
    struct account *account;
    bool lost;
};

static bool add_group(struct account *a, gid_t gid)
{
    gid_t *grown = realloc(a->groups, (a->group_count + 1) * sizeof *grown);
    if (!grown)
        return false;
    a->groups = grown;
    a->groups[a->group_count++] = gid;
    return true;
}

static bool member_entry(char **field, void *context)
{
    struct membership *m = context;
    uint32_t gid;
    if (!number(field[2], &gid) || gid == m->account->gid)
        return false;
    char *members = field[3], *member;
    while ((member = strsep(&members, ",")) != NULL) {
        if (strcmp(member, m->account->name) == 0) {
            m->lost = !add_group(m->account, gid);
            break;
        }
    }
    return m->lost;
}

static const struct table passwd = {"/etc/passwd", 7, passwd_entry};
static const struct table group = {"/etc/group", 4, group_entry};
static const struct table members = {"/etc/group", 4, member_entry};

static int find_user(const char *name, struct account *a)
{
    struct wanted w = {.name = name, .account = a};
    w.by_number = number(name, &w.id);
    int error = scan(&passwd, &w);
    if (error || w.found)
        return error ? error : w.lost ? ENOMEM : 0;
    bool is_root = strcmp(name, "root") == 0;
    if (!w.by_number && !is_root)
        return ENOENT;
    a->uid = is_root ? 0 : w.id;
    return a->uid != 0 || (keep(&a->name, "root") && keep(&a->home, "/root")) ? 0 : ENOMEM;
}

/* A requested group replaces all others, as in container engines. */
static int find_group(const char *name, struct account *a)
{
    struct wanted w = {.name = name};
    int error = number(name, &w.id) ? 0 : scan(&group, &w);
    if (!error && !w.found && !number(name, &w.id))
        error = ENOENT;
    a->gid = w.id;
    return error;
}

int account_find(const char *user, struct account *a)
{
    *a = (struct account){0};
    char *name = strdup(*user ? user : "0");
    if (!name || !keep(&a->home, "/") || !keep(&a->shell, "/bin/sh")) {
        free(name);
        return ENOMEM;
    }
    char *group_name = strchr(name, ':');
    if (group_name)
        *group_name++ = 0;
    int error = find_user(name, a);
    if (!error && group_name) {
        error = find_group(group_name, a);
    } else if (!error && a->name) {
        struct membership m = {.account = a};
        error = scan(&members, &m);
        error = m.lost ? ENOMEM : error;
    }
    free(name);
    return error;
}

void account_free(struct account *a)
{
    free(a->groups);
    free(a->name);
    free(a->home);
    free(a->shell);
    *a = (struct account){0};
}
