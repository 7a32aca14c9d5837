/* Volumes: disks that outlive the machine. They are known by the serial number that the VMM gives them, never by what is on them: that was
 * written by other guests. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>

#define DISK_WAIT_MS 10000
#define NO_VOLUME (-1)

/* The number of the volume that is /dev/vdX, or NO_VOLUME. */
static int volume_number(char letter)
{
    static const char prefix[] = "volume";
    char path[32], serial[32], *end;
    snprintf(path, sizeof path, "/sys/block/vd%c/serial", letter);
    if (read_file(path, serial, sizeof serial) <= 0 || strncmp(serial, prefix, sizeof prefix - 1) != 0)
        return NO_VOLUME;
    long number = strtol(serial + sizeof prefix - 1, &end, 10);
    return end == serial + sizeof prefix - 1 || number < 0 || number >= VOLUMES_MAX ? NO_VOLUME : (int)number;
}

bool is_volume(char letter)
{
    return volume_number(letter) != NO_VOLUME;
}

static bool find_volume(int number, char device[16])
{
    for (char letter = 'a'; letter <= 'z'; letter++) {
        if (volume_number(letter) == number) {
            snprintf(device, 16, "/dev/vd%c", letter);
            return true;
        }
    }
    return false;
}

int volume_mount(const struct volume *v)
{
    char device[16], path[PATH_MAX];
    for (int64_t end = now_ms() + DISK_WAIT_MS; !find_volume(v->number, device); pause_ms(5)) {
        if (now_ms() >= end)
            return ENODEV;
    }
    if (strlen(v->path) >= sizeof path)
        return ENAMETOOLONG;
    strcpy(path, v->path);
    int error = make_parents(path);
    if (!error && mkdir(path, 0755) < 0 && errno != EEXIST)
        error = errno;
    if (error)
        return error;
    /* It is for data: what another machine has left there gives nobody rights in this one. A journal can only be replayed by who may write:
     * the host has seen to it that it is empty. */
    unsigned long flags = MS_NOSUID | MS_NODEV | MS_NOATIME | (v->readonly ? MS_RDONLY : 0);
    return mount(device, path, "ext4", flags, v->readonly ? "noload" : "noinit_itable,no_prefetch_block_bitmaps") < 0 ? errno : 0;
}

/* Leave no journal behind, where the machine ends by itself. */
void volume_unmount(const char *path)
{
    if (umount2(path, 0) < 0 && mount(NULL, path, NULL, MS_REMOUNT | MS_RDONLY, NULL) < 0)
        say("the volume at %s needs its journal at the next start", path);
}
