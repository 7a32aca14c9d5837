/* base.c: time, the console, whole files. All other parts use these. */
#ifndef COPPICE_BASE_H
#define COPPICE_BASE_H

#include <limits.h>
#include <poll.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

int64_t now_ms(void); /* CLOCK_MONOTONIC */
int64_t now_us(void);
uint64_t clock_now(void); /* CLOCK_REALTIME, in nanoseconds */
int64_t deadline_in(uint64_t ms); /* in now_ms() time; a delay of any length */
void pause_ms(int ms);
void shut(int *fd); /* close it unless it is -1, which it is then */
void say(const char *format, ...) __attribute__((format(printf, 1, 2))); /* one line to the console */
bool write_all(int fd, const void *data, size_t size);                   /* errno is set if it fails */

/* Read or write a whole file, never a part of it. Text is terminated by a zero. */
ssize_t read_file(const char *path, char *buffer, size_t capacity); /* -1 with errno; EFBIG: it does not fit */
char *load_file(const char *path, size_t *size);                    /* to be freed; NULL with errno */
char *load_open(int fd, size_t *size);                              /* the same of a descriptor, which is closed; -1: errno says why */
void sys_write(const char *path, const char *value);                /* set a kernel parameter; a missing one is skipped */
int make_parents(char *path);                                       /* of a writable string; 0 or an errno */
int make_directories(const char *path);                             /* the parents and the directory itself; 0 or an errno */

#endif
