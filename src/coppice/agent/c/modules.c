/* Load kernel modules from the initramfs, in the listed order. */
#define _GNU_SOURCE
#include "boot.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Return the parameters of virtio_mmio. If the VMM describes devices by `virtio_mmio.device=` words
 * instead of ACPI, the kernel passes these words only to a built-in driver. The caller frees the
 * result; NULL: out of memory. */
static char *with_devices(const char *given)
{
    static const char prefix[] = "virtio_mmio.device=";
    size_t size;
    char *line = load_file("/proc/cmdline", &size), *parameters = strdup(given);
    char *rest = line, *word;
    while (parameters && (word = strsep(&rest, " \n")) != NULL) {
        char *longer = NULL;
        if (strncmp(word, prefix, sizeof prefix - 1) != 0)
            continue;
        if (asprintf(&longer, "%s device=%s", parameters, word + sizeof prefix - 1) < 0)
            longer = NULL;
        free(parameters);
        parameters = longer;
    }
    free(line);
    return parameters;
}

static void load(const char *directory, const char *file, const char *given)
{
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s/%s", directory, file);
    bool mmio = strcmp(file, "virtio_mmio.ko") == 0 || strcmp(file, "virtio-mmio.ko") == 0;
    char *parameters = mmio ? with_devices(given) : strdup(given);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (!parameters || fd < 0 || (syscall(SYS_finit_module, fd, parameters, 0) < 0 && errno != EEXIST))
        say("module %s: %s", file, strerror(errno)); /* not fatal: the machine may lack the device */
    if (fd >= 0)
        close(fd);
    free(parameters);
}

bool has_virtio_device(unsigned id)
{
    static const char bus[] = "/sys/bus/virtio/devices";
    DIR *directory = opendir(bus);
    struct dirent *entry;
    bool found = false;
    while (!found && directory && (entry = readdir(directory)) != NULL) {
        char path[512], text[32];
        snprintf(path, sizeof path, "%s/%s/device", bus, entry->d_name);
        found = entry->d_name[0] != '.' && read_file(path, text, sizeof text) > 0 && strtoul(text, NULL, 16) == id;
    }
    if (directory)
        closedir(directory);
    return found;
}

void load_modules(const char *directory)
{
    char path[PATH_MAX];
    size_t size;
    snprintf(path, sizeof path, "%s/order", directory);
    char *order = load_file(path, &size);
    if (!order && errno != ENOENT) /* without the file, everything is built in */
        say("%s: %s", path, strerror(errno));
    char *rest = order, *line;
    while ((line = strsep(&rest, "\n")) != NULL) {
        char *parameters = line;
        char *file = strsep(&parameters, " \t");
        if (*file)
            load(directory, file, parameters ? parameters : "");
    }
    free(order);
}
