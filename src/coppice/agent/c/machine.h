/* The state of the machine, and the operations on it. */
#ifndef COPPICE_MACHINE_H
#define COPPICE_MACHINE_H

#include "boot.h"
#include "jobs.h"

/* ---- control.c ---- */

struct machine {
    struct wire wires[PORT_COUNT];
    size_t wire_count;
    struct image image;
    int overlay;   /* descriptor of the overlay's file system; -1: none */
    int random;    /* /dev/urandom */
    int children;  /* signalfd of SIGCHLD */
    bool confined; /* serving a test: do nothing that affects the host */
    int64_t thaw_at; /* 0: not frozen */
    uint64_t serial;
    bool identified; /* all steps of the identity with this serial succeeded */
    char *mounted[VOLUMES_MAX]; /* paths of volumes, in the order in which they were mounted */
    size_t mounted_count;
};

void serve(struct machine *m) __attribute__((noreturn));

/* ---- freeze.c; 0 or an errno ---- */

int freeze(struct machine *m, uint64_t timeout_ms);
int thaw(struct machine *m);
int clock_set(uint64_t ns);

/* ---- identity.c, power.c ---- */

int identity(struct machine *m, const struct frame *request, struct reply *r); /* 0 or an errno; `r` is the payload of OK or ERROR */
void power_off(struct machine *m, struct wire *answered, uint64_t grace_ms);

#endif
