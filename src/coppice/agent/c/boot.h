/* From the kernel to the ports: mounts, modules, disks, volumes. */
#ifndef COPPICE_BOOT_H
#define COPPICE_BOOT_H

#include "wire.h"

/* ---- boot.c, modules.c ---- */

int boot(void); /* mounts, modules, root; returns a descriptor of the overlay's file system, or not at all */
void load_modules(const char *directory);

#define VIRTIO_CONSOLE 3 /* linux/virtio_ids.h */
#define VIRTIO_VSOCK 19
bool has_virtio_device(unsigned id); /* whether the VMM offers one */

/* ---- volumes.c ---- */

#define VOLUMES_MAX 8 /* MAX_VOLUMES of the host */

struct volume {
    int number; /* among the machine's volumes */
    bool readonly;
    const char *path;
};

bool is_volume(char letter); /* whether /dev/vdX is one */
int volume_mount(const struct volume *v); /* 0 or an errno */
void volume_unmount(const char *path);

/* ---- ports.c ---- */

struct port {
    char path[64]; /* of a virtio port; empty: none */
    int listener;  /* of a vsock port; -1: none */
};

bool ports_find(struct port ports[PORT_COUNT]); /* false: there is no control port */
int port_open(const struct port *port);

#endif
