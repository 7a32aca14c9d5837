/* A process of the agent's own that serves one request: its input is the host's data, its output
 * is data for the host, and it ends with one reply. */
#ifndef COPPICE_HELPER_H
#define COPPICE_HELPER_H

#include "wire.h"

#define ID_MAX (UINT32_MAX - 1) /* of a user or group */

/* ---- helper.c: in that process ---- */

void helper_begin(int in, int out, int reply);  /* these are its only descriptors, and the console */
bool helper_put(const void *data, size_t size); /* false: the host is gone */
ssize_t helper_read(void *data, size_t size);   /* 0: the end of the data; -1: there is no end, since the host is gone */
bool helper_wait(int fd); /* until it can be read; false: the request was cancelled */
void helper_ok(const struct reply *r) __attribute__((noreturn));
void helper_fail(int error, const char *format, ...) __attribute__((format(printf, 2, 3), noreturn));
void helper_fail_at(int error, const char *path) __attribute__((noreturn));

struct path_request {
    char *path, *to;
    uint64_t flags, mode;
};

struct path_request helper_request(const struct frame *f); /* a request without a path fails */

/* ---- warm.c ---- */

void warm_programs(void);

/* ---- files.c, paths.c, watch.c, tree_out.c, tree_in.c: the requests ---- */

void file_read(const struct frame *request);
void file_write(const struct frame *request);
void file_stat(const struct frame *request);
void file_list(const struct frame *request);
void file_mkdir(const struct frame *request);
void file_move(const struct frame *request);
void file_remove(const struct frame *request);
void file_watch(const struct frame *request);
void tree_out(const struct frame *request);
void tree_in(const struct frame *request);

#endif
