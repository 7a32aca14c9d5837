/* Kernel modules from the initramfs, in the order in which they are listed. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* The kernel gives parameters from its command line only to modules that are built in. virtio_mmio needs its devices from there, where
 * the VMM describes them by `virtio_mmio.device=` words rather than by ACPI. */
static void add_devices(char *parameters, size_t capacity)
{
    static const char prefix[] = "virtio_mmio.device=";
    char line[4096];
    if (read_file("/proc/cmdline", line, sizeof line) < 0)
        return;
    size_t used = strlen(parameters);
    char *rest = line, *word;
    while ((word = strsep(&rest, " \n")) != NULL) {
        if (strncmp(word, prefix, sizeof prefix - 1) != 0)
            continue;
        int size = snprintf(parameters + used, capacity - used, " device=%s", word + sizeof prefix - 1);
        if (size > 0 && (size_t)size < capacity - used)
            used += (size_t)size;
        else
            parameters[used] = 0;
    }
}

static void load(const char *directory, const char *file, const char *given)
{
    char path[PATH_MAX], parameters[4096];
    snprintf(path, sizeof path, "%s/%s", directory, file);
    snprintf(parameters, sizeof parameters, "%s", given);
    if (strcmp(file, "virtio_mmio.ko") == 0 || strcmp(file, "virtio-mmio.ko") == 0)
        add_devices(parameters, sizeof parameters);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || (syscall(SYS_finit_module, fd, parameters, 0) < 0 && errno != EEXIST))
        say("module %s: %s", file, strerror(errno)); /* a machine without the device does without the module */
    if (fd >= 0)
        close(fd);
}

void load_modules(const char *directory)
{
    char path[PATH_MAX], order[16384];
    snprintf(path, sizeof path, "%s/order", directory);
    if (read_file(path, order, sizeof order) < 0)
        return; /* a kernel with everything built in */
    char *rest = order, *line;
    while ((line = strsep(&rest, "\n")) != NULL) {
        char *parameters = line;
        char *file = strsep(&parameters, " \t");
        if (*file)
            load(directory, file, parameters ? parameters : "");
    }
}
