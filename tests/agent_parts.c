/* Parts of the guest agent without a machine, for tests in separate namespaces. The arguments are
 * carried out in order:
 *
 *   own-files           mount the agent's own files over those in /etc
 *   hosts=NAME          add the machine's own name to /etc/hosts
 *   resolv=TEXT         write /etc/resolv.conf, as an identity does
 *   sh=COMMAND          run a shell command
 *   refuse-mac=up       the card refuses a new MAC while it is up
 *   refuse-mac=always   the card refuses a new MAC
 *   guest-files=PATH    place the files of a directory, as at the boot
 *   network=MAC,ADDRESS,GATEWAY,ADDRESS6,GATEWAY6   each may be empty; prints the errno
 *   identity=HEX        the payload of an IDENTITY request; prints the answer's type and payload in hex
 */
#define _GNU_SOURCE
#include "machine.h"
#include "random.h"
#include "self.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/random.h>
#include <net/if.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *refused = "";

static bool is_up(int fd, const struct ifreq *about)
{
    struct ifreq r = *about;
    return syscall(SYS_ioctl, fd, SIOCGIFFLAGS, &r) == 0 && r.ifr_flags & IFF_UP;
}

int ioctl(int fd, unsigned long request, ...)
{
    va_list arguments;
    va_start(arguments, request);
    void *argument = va_arg(arguments, void *);
    va_end(arguments);
    if (request == SIOCSIFHWADDR && (strcmp(refused, "always") == 0 || (strcmp(refused, "up") == 0 && is_up(fd, argument)))) {
        errno = EBUSY;
        return -1;
    }
    if (request == RNDADDENTROPY || request == _IO('R', 0x07)) /* the whole host shares this kernel's generator */
        return 0;
    return (int)syscall(SYS_ioctl, fd, request, argument);
}

static int set_network(char *text)
{
    unsigned m[6];
    uint8_t mac[6];
    char *first = strsep(&text, ","), *address = strsep(&text, ","), *gateway = strsep(&text, ",");
    char *address6 = text ? strsep(&text, ",") : "", *gateway6 = text ? text : "";
    bool has_mac = sscanf(first, "%x:%x:%x:%x:%x:%x", m, m + 1, m + 2, m + 3, m + 4, m + 5) == 6;
    for (int i = 0; has_mac && i < 6; i++)
        mac[i] = (uint8_t)m[i];
    struct network n = {.mac = has_mac ? mac : NULL, .address = *address ? address : NULL, .gateway = *gateway ? gateway : NULL};
    n.address6 = *address6 ? address6 : NULL;
    n.gateway6 = *gateway6 ? gateway6 : NULL;
    return network_set(&n);
}

static void send_identity(const char *hex)
{
    static struct machine m;
    struct reply r = {0};
    size_t size = strlen(hex) / 2;
    uint8_t *payload = malloc(size + 1);
    for (size_t i = 0; i < size; i++)
        sscanf(hex + 2 * i, "%2hhx", payload + i);
    m.overlay = m.random = m.children = -1;
    int error = identity(&m, &(struct frame){.type = IDENTITY, .size = (uint32_t)size, .payload = payload}, &r);
    printf("%02x", error ? ERROR : OK);
    for (size_t i = 0; i < r.size; i++)
        printf("%02x", r.data[i]);
    printf("\n");
    free(payload);
}

static bool take(const char *name, char *argument, char **value)
{
    size_t size = strlen(name);
    *value = argument + size;
    return strncmp(argument, name, size) == 0;
}

int main(int argc, char **argv)
{
    umask(0);
    for (int i = 1; i < argc; i++) {
        char *value;
        int error = 0;
        if (take("own-files", argv[i], &value))
            mount_own_files();
        else if (take("hosts=", argv[i], &value))
            error = put_hosts(value);
        else if (take("resolv=", argv[i], &value))
            error = put_resolv_conf(value);
        else if (take("sh=", argv[i], &value))
            error = system(value);
        else if (take("refuse-mac=", argv[i], &value))
            refused = value;
        else if (take("guest-files=", argv[i], &value))
            place_guest_files(open(value, O_RDONLY | O_DIRECTORY | O_CLOEXEC));
        else if (take("network=", argv[i], &value))
            printf("%d\n", set_network(value));
        else if (take("identity=", argv[i], &value))
            send_identity(value);
        else
            error = EINVAL;
        fflush(stdout);
        if (error) {
            fprintf(stderr, "%s: %d\n", argv[i], error);
            return 1;
        }
    }
    while (wait(NULL) > 0) {
    }
    return 0;
}
