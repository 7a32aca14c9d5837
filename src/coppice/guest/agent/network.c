/* The first network card, by rtnetlink: its MAC, address, gateway and MTU. */
#include "agent.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#define ADDRESSES_MAX 32

struct message {
    struct nlmsghdr header;
    char body[512];
};

struct card {
    int index;
    uint8_t mac[6];
    uint32_t mtu;
    bool up;
};

struct ipv4 {
    uint32_t address;
    uint8_t prefix;
};

struct current {
    struct card card;
    struct ipv4 addresses[ADDRESSES_MAX];
    size_t count;
};

static void *prepare(struct message *m, uint16_t type, uint16_t flags, size_t size)
{
    memset(m, 0, sizeof *m);
    m->header.nlmsg_type = type;
    m->header.nlmsg_flags = (uint16_t)(NLM_F_REQUEST | flags);
    m->header.nlmsg_len = (uint32_t)NLMSG_LENGTH(size);
    return NLMSG_DATA(&m->header);
}

static void add(struct message *m, uint16_t type, const void *value, size_t size)
{
    struct rtattr *a = (struct rtattr *)((char *)m + NLMSG_ALIGN(m->header.nlmsg_len));
    a->rta_type = type;
    a->rta_len = (uint16_t)RTA_LENGTH(size);
    memcpy(RTA_DATA(a), value, size);
    m->header.nlmsg_len = (uint32_t)(NLMSG_ALIGN(m->header.nlmsg_len) + RTA_ALIGN(a->rta_len));
}

static int send_message(int fd, struct message *m)
{
    return send(fd, m, m->header.nlmsg_len, 0) < 0 ? errno : 0;
}

/* Do it, and wait for the kernel's acknowledgement. */
static int request(int fd, struct message *m)
{
    m->header.nlmsg_flags |= NLM_F_ACK;
    int error = send_message(fd, m);
    char buffer[8192] __attribute__((aligned(NLMSG_ALIGNTO)));
    while (!error) {
        ssize_t size = recv(fd, buffer, sizeof buffer, 0);
        if (size < 0)
            return errno;
        const struct nlmsghdr *h = (const struct nlmsghdr *)buffer;
        if (NLMSG_OK(h, (size_t)size) && h->nlmsg_type == NLMSG_ERROR)
            return -((const struct nlmsgerr *)NLMSG_DATA(h))->error;
    }
    return error;
}

/* ---- what there is ---- */

static void note_link(const struct nlmsghdr *h, struct current *c)
{
    const struct ifinfomsg *info = NLMSG_DATA(h);
    if (info->ifi_type != ARPHRD_ETHER || c->card.index)
        return;
    c->card.index = info->ifi_index;
    c->card.up = info->ifi_flags & IFF_UP;
    int left = (int)IFLA_PAYLOAD(h);
    for (const struct rtattr *a = IFLA_RTA(info); RTA_OK(a, left); a = RTA_NEXT(a, left)) {
        if (a->rta_type == IFLA_ADDRESS && RTA_PAYLOAD(a) == sizeof c->card.mac)
            memcpy(c->card.mac, RTA_DATA(a), sizeof c->card.mac);
        else if (a->rta_type == IFLA_MTU)
            memcpy(&c->card.mtu, RTA_DATA(a), sizeof c->card.mtu);
    }
}

static void note_address(const struct nlmsghdr *h, struct current *c)
{
    const struct ifaddrmsg *info = NLMSG_DATA(h);
    if ((int)info->ifa_index != c->card.index || info->ifa_family != AF_INET || c->count == ADDRESSES_MAX)
        return;
    int left = (int)IFA_PAYLOAD(h);
    for (const struct rtattr *a = IFA_RTA(info); RTA_OK(a, left); a = RTA_NEXT(a, left)) {
        if (a->rta_type == IFA_LOCAL) {
            memcpy(&c->addresses[c->count].address, RTA_DATA(a), 4);
            c->addresses[c->count++].prefix = info->ifa_prefixlen;
        }
    }
}

static int dump(int fd, uint16_t type, struct current *c)
{
    struct message m;
    struct rtgenmsg *generic = prepare(&m, type, NLM_F_DUMP, sizeof *generic);
    generic->rtgen_family = type == RTM_GETADDR ? AF_INET : AF_UNSPEC;
    int error = send_message(fd, &m);
    char buffer[32768] __attribute__((aligned(NLMSG_ALIGNTO)));
    while (!error) {
        ssize_t size = recv(fd, buffer, sizeof buffer, 0);
        if (size < 0)
            return errno;
        unsigned left = (unsigned)size;
        for (const struct nlmsghdr *h = (const struct nlmsghdr *)buffer; NLMSG_OK(h, left); h = NLMSG_NEXT(h, left)) {
            if (h->nlmsg_type == NLMSG_DONE)
                return 0;
            if (h->nlmsg_type == NLMSG_ERROR)
                return -((const struct nlmsgerr *)NLMSG_DATA(h))->error;
            if (h->nlmsg_type == RTM_NEWLINK)
                note_link(h, c);
            else if (h->nlmsg_type == RTM_NEWADDR)
                note_address(h, c);
        }
    }
    return error;
}

/* ---- what shall be ---- */

static int set_link(int fd, const struct card *card, const struct network *n, bool up)
{
    struct message m;
    struct ifinfomsg *info = prepare(&m, RTM_NEWLINK, 0, sizeof *info);
    info->ifi_index = card->index;
    info->ifi_change = IFF_UP;
    info->ifi_flags = up ? IFF_UP : 0;
    if (up && n->mac)
        add(&m, IFLA_ADDRESS, n->mac, 6);
    if (up && n->mtu)
        add(&m, IFLA_MTU, &n->mtu, sizeof n->mtu);
    return request(fd, &m);
}

static int change_address(int fd, int index, uint16_t type, struct ipv4 ip)
{
    struct message m;
    struct ifaddrmsg *info = prepare(&m, type, type == RTM_NEWADDR ? NLM_F_CREATE | NLM_F_REPLACE : 0, sizeof *info);
    info->ifa_family = AF_INET;
    info->ifa_prefixlen = ip.prefix;
    info->ifa_index = (unsigned)index;
    add(&m, IFA_LOCAL, &ip.address, 4);
    add(&m, IFA_ADDRESS, &ip.address, 4);
    if (type == RTM_NEWADDR && ip.prefix < 31) {
        uint32_t broadcast = ip.address | htonl((uint32_t)(0xffffffffu >> ip.prefix));
        add(&m, IFA_BROADCAST, &broadcast, 4);
    }
    return request(fd, &m);
}

static int set_gateway(int fd, int index, uint32_t gateway)
{
    struct message m;
    struct rtmsg *route = prepare(&m, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, sizeof *route);
    route->rtm_family = AF_INET;
    route->rtm_table = RT_TABLE_MAIN;
    route->rtm_protocol = RTPROT_BOOT;
    route->rtm_scope = RT_SCOPE_UNIVERSE;
    route->rtm_type = RTN_UNICAST;
    route->rtm_flags = RTNH_F_ONLINK; /* a gateway may lie outside of the prefix: a /32 behind a tap device */
    add(&m, RTA_GATEWAY, &gateway, 4);
    add(&m, RTA_OIF, &index, sizeof index);
    return request(fd, &m);
}

static bool parse_address(const char *text, struct ipv4 *ip)
{
    char address[INET_ADDRSTRLEN];
    const char *slash = strchr(text, '/');
    size_t size = slash ? (size_t)(slash - text) : strlen(text);
    if (size >= sizeof address)
        return false;
    memcpy(address, text, size);
    address[size] = 0;
    char *end = NULL;
    unsigned long prefix = slash ? strtoul(slash + 1, &end, 10) : 32;
    ip->prefix = (uint8_t)prefix;
    return inet_pton(AF_INET, address, &ip->address) == 1 && prefix <= 32 && (!end || (end != slash + 1 && *end == 0));
}

static int apply(int fd, const struct network *n)
{
    struct ipv4 ip = {0}, gateway = {0};
    if ((n->address && !parse_address(n->address, &ip)) || (n->gateway && !parse_address(n->gateway, &gateway)))
        return EINVAL;
    struct current now = {0};
    int error = dump(fd, RTM_GETLINK, &now);
    if (!error && !now.card.index)
        error = ENODEV;
    if (!error)
        error = dump(fd, RTM_GETADDR, &now);
    bool same_card = now.card.up && (!n->mac || memcmp(n->mac, now.card.mac, 6) == 0) && (!n->mtu || n->mtu == now.card.mtu);
    bool same_address = !n->address || (now.count == 1 && now.addresses[0].address == ip.address && now.addresses[0].prefix == ip.prefix);
    /* A card that gets another MAC is taken down first: that also forgets neighbours, routes and link-local addresses. */
    if (!error && !same_card && now.card.up)
        error = set_link(fd, &now.card, n, false);
    for (size_t i = 0; !error && !same_address && i < now.count; i++)
        error = change_address(fd, now.card.index, RTM_DELADDR, now.addresses[i]);
    if (!error && !same_card)
        error = set_link(fd, &now.card, n, true);
    if (!error && !same_address)
        error = change_address(fd, now.card.index, RTM_NEWADDR, ip);
    if (!error && n->gateway)
        error = set_gateway(fd, now.card.index, gateway.address);
    return error;
}

int network_set(const struct network *n)
{
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (fd < 0)
        return errno;
    struct timeval limit = {.tv_sec = 5};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    int error = apply(fd, n);
    close(fd);
    return error;
}

void link_up_loopback(void)
{
    struct ifreq request = {.ifr_name = "lo", .ifr_flags = IFF_UP | IFF_RUNNING};
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || ioctl(fd, SIOCSIFFLAGS, &request) < 0)
        say("the loopback interface stays down: %s", strerror(errno));
    if (fd >= 0)
        close(fd);
}
