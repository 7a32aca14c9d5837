/* Volumes: disks that outlive the machine. They are known by the serial number that the VMM gives
 * them or, if it cannot give serial numbers, by their place among the disks. Their contents do not
 * identify them, because other guests may have written them. */
#define _GNU_SOURCE
#include "boot.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#define DISK_WAIT_MS 10000
#define NO_VOLUME (-1)

/* Tell whether the disks are in the order that the kernel command line names: a VMM that cannot set
 * serial numbers says so there. */
static bool disks_in_order(void)
{
    static int known = -1;
    size_t size;
    char *line = known < 0 ? load_file("/proc/cmdline", &size) : NULL;
    if (line)
        known = strstr(line, "coppice.disks=overlay,root,volumes") != NULL;
    free(line);
    return known > 0;
}

/* Return the number of the volume at /dev/vdX, or NO_VOLUME. */
static int volume_number(char letter)
{
    static const char prefix[] = "volume";
    char path[32], serial[32], *end;
    snprintf(path, sizeof path, "/sys/block/vd%c/serial", letter);
    if (disks_in_order())
        return letter >= 'c' && letter < 'c' + VOLUMES_MAX && access(path, F_OK) == 0 ? letter - 'c' : NO_VOLUME;
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
    char device[16];
    for (int64_t end = now_ms() + DISK_WAIT_MS; !find_volume(v->number, device); pause_ms(5)) {
        if (now_ms() >= end)
            return ENODEV;
    }
    int error = make_directories(v->path);
    if (error)
        return error;
    /* nosuid and nodev: files that another machine left must not give rights in this one. noload: a
     * read-only mount cannot replay the journal, and the host has made sure that it is empty. */
    unsigned long flags = MS_NOSUID | MS_NODEV | MS_NOATIME | (v->readonly ? MS_RDONLY : 0);
    return mount(device, v->path, "ext4", flags, v->readonly ? "noload" : "noinit_itable,no_prefetch_block_bitmaps") < 0 ? errno : 0;
}

/* Unmount cleanly, without a pending journal, if the machine ends by itself. */
void volume_unmount(const char *path)
{
    if (umount2(path, 0) < 0 && mount(NULL, path, NULL, MS_REMOUNT | MS_RDONLY, NULL) < 0)
        say("the volume at %s needs its journal at the next start", path);
}
