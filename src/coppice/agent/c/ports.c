/* The agent's ports: virtio-serial ports by their names; where the VMM has none, the same numbers
 * over vsock. */
#define _GNU_SOURCE
#include "boot.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#define VSOCK_BASE 1024     /* port coppice.N listens at VSOCK_BASE + N */
#define WAIT_MS 10000       /* for the control port */
#define SETTLE_MS 20        /* without a change, when every port that is there has its name */

static const char class_directory[] = "/sys/class/virtio-ports";

struct scan {
    int ports, named; /* how many there are, and how many of them have told their name */
};

/* A port appears first, and its name in a later message of the host. */
static struct scan look(struct port ports[PORT_COUNT])
{
    struct scan s = {0};
    DIR *directory = opendir(class_directory);
    struct dirent *entry;
    while (directory && (entry = readdir(directory)) != NULL) {
        char path[512], name[64];
        if (entry->d_name[0] == '.')
            continue;
        s.ports++;
        snprintf(path, sizeof path, "%s/%s/name", class_directory, entry->d_name);
        if (read_file(path, name, sizeof name) < 0)
            continue;
        s.named++;
        unsigned number;
        if (sscanf(name, "coppice.%u", &number) == 1 && number < PORT_COUNT)
            snprintf(ports[number].path, sizeof ports[number].path, "/dev/%.50s", entry->d_name);
    }
    if (directory)
        closedir(directory);
    return s;
}

static int listen_vsock(unsigned number)
{
    struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_ANY, .svm_port = VSOCK_BASE + number};
    int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd >= 0 && bind(fd, (struct sockaddr *)&address, sizeof address) == 0 && listen(fd, 4) == 0)
        return fd;
    if (fd >= 0)
        close(fd);
    return -1;
}

static bool use_vsock(struct port ports[PORT_COUNT])
{
    if (access("/dev/vsock", F_OK) < 0 || !has_virtio_device(VIRTIO_VSOCK))
        return false;
    for (unsigned i = 0; i < PORT_COUNT; i++)
        ports[i].listener = listen_vsock(i);
    return ports[0].listener >= 0;
}

bool ports_find(struct port ports[PORT_COUNT])
{
    for (int i = 0; i < PORT_COUNT; i++)
        ports[i] = (struct port){.listener = -1};
    struct scan before = {0};
    int64_t start = now_ms(), changed = start;
    for (;;) {
        struct scan s = look(ports);
        int64_t now = now_ms();
        if (memcmp(&s, &before, sizeof s) != 0) {
            before = s;
            changed = now;
        }
        if (s.named == s.ports && ports[0].path[0] && (s.ports >= PORT_COUNT || now - changed >= SETTLE_MS))
            return true;
        if (s.ports == 0 && !has_virtio_device(VIRTIO_CONSOLE) && use_vsock(ports))
            return true;
        if (now - start >= WAIT_MS)
            return ports[0].path[0];
        pause_ms(2);
    }
}

int port_open(const struct port *port)
{
    return open(port->path, O_RDWR | O_CLOEXEC | O_NONBLOCK);
}
