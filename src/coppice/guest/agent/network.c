/* The first network card: its MAC, address, gateway and MTU. */
#include "agent.h"

#include <arpa/inet.h>
#include <errno.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <netinet/in.h>
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

struct ipv4 {
    uint32_t address;
    uint8_t prefix;
};

struct addresses {
    struct ipv4 item[ADDRESSES_MAX];
    size_t count;
};

/* What was set last. A fork is told the same again, but for its MAC, and every instruction that it runs for the first time is
 * translated anew under emulation: what is still so is asked with three small ioctls and left alone. */
static struct {
    int rtnetlink, inet; /* sockets */
    int index;           /* of the card; 0: not looked for yet */
    char name[IFNAMSIZ];
    struct ipv4 address;
    uint32_t gateway;
} card = {.rtnetlink = -1, .inet = -1};

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

static int send_message(struct message *m)
{
    return send(card.rtnetlink, m, m->header.nlmsg_len, 0) < 0 ? errno : 0;
}

/* Do it, and wait for the kernel's acknowledgement. */
static int request(struct message *m)
{
    m->header.nlmsg_flags |= NLM_F_ACK;
    int error = send_message(m);
    char buffer[4096] __attribute__((aligned(NLMSG_ALIGNTO)));
    while (!error) {
        ssize_t size = recv(card.rtnetlink, buffer, sizeof buffer, 0);
        if (size < 0)
            return errno;
        const struct nlmsghdr *h = (const struct nlmsghdr *)buffer;
        if (NLMSG_OK(h, (size_t)size) && h->nlmsg_type == NLMSG_ERROR)
            return -((const struct nlmsgerr *)NLMSG_DATA(h))->error;
    }
    return error;
}

/* ---- what there is ---- */

/* The first card that is Ethernet. */
static void note_link(const struct nlmsghdr *h)
{
    const struct ifinfomsg *info = NLMSG_DATA(h);
    if (info->ifi_type != ARPHRD_ETHER || card.index)
        return;
    int left = (int)IFLA_PAYLOAD(h);
    for (const struct rtattr *a = IFLA_RTA(info); RTA_OK(a, left); a = RTA_NEXT(a, left)) {
        if (a->rta_type == IFLA_IFNAME && RTA_PAYLOAD(a) <= sizeof card.name) {
            memcpy(card.name, RTA_DATA(a), RTA_PAYLOAD(a));
            card.index = info->ifi_index;
        }
    }
}

static void note_address(const struct nlmsghdr *h, struct addresses *found)
{
    const struct ifaddrmsg *info = NLMSG_DATA(h);
    if ((int)info->ifa_index != card.index || info->ifa_family != AF_INET)
        return;
    int left = (int)IFA_PAYLOAD(h);
    for (const struct rtattr *a = IFA_RTA(info); RTA_OK(a, left); a = RTA_NEXT(a, left)) {
        if (a->rta_type == IFA_LOCAL && found->count < ADDRESSES_MAX) {
            memcpy(&found->item[found->count].address, RTA_DATA(a), 4);
            found->item[found->count++].prefix = info->ifa_prefixlen;
        }
    }
}

static int dump(uint16_t type, struct addresses *found)
{
    struct message m;
    struct rtgenmsg *generic = prepare(&m, type, NLM_F_DUMP, sizeof *generic);
    generic->rtgen_family = type == RTM_GETADDR ? AF_INET : AF_UNSPEC;
    int error = send_message(&m);
    char buffer[32768] __attribute__((aligned(NLMSG_ALIGNTO)));
    while (!error) {
        ssize_t size = recv(card.rtnetlink, buffer, sizeof buffer, 0);
        if (size < 0)
            return errno;
        unsigned left = (unsigned)size;
        for (const struct nlmsghdr *h = (const struct nlmsghdr *)buffer; NLMSG_OK(h, left); h = NLMSG_NEXT(h, left)) {
            if (h->nlmsg_type == NLMSG_DONE)
                return 0;
            if (h->nlmsg_type == NLMSG_ERROR)
                return -((const struct nlmsgerr *)NLMSG_DATA(h))->error;
            if (h->nlmsg_type == RTM_NEWLINK)
                note_link(h);
            else if (h->nlmsg_type == RTM_NEWADDR)
                note_address(h, found);
        }
    }
    return error;
}

static int find_card(void)
{
    struct timeval limit = {.tv_sec = 5};
    if (card.inet < 0)
        card.inet = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (card.rtnetlink < 0)
        card.rtnetlink = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
    if (card.inet < 0 || card.rtnetlink < 0)
        return errno;
    setsockopt(card.rtnetlink, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    int error = dump(RTM_GETLINK, NULL);
    return !error && !card.index ? ENODEV : error;
}

/* ---- what shall be ---- */

static struct ifreq about_card(void)
{
    struct ifreq r = {0};
    memcpy(r.ifr_name, card.name, sizeof r.ifr_name);
    return r;
}

static int set_up(bool up)
{
    struct ifreq r = about_card();
    if (ioctl(card.inet, SIOCGIFFLAGS, &r) < 0)
        return errno;
    if (!(r.ifr_flags & IFF_UP) == !up)
        return 0;
    r.ifr_flags = (short)(r.ifr_flags ^ IFF_UP);
    return ioctl(card.inet, SIOCSIFFLAGS, &r) < 0 ? errno : 0;
}

/* The kernel forgets what it knows of neighbours when the MAC changes. */
static int set_mac(const uint8_t *mac)
{
    struct ifreq r = about_card();
    if (ioctl(card.inet, SIOCGIFHWADDR, &r) < 0)
        return errno;
    if (memcmp(r.ifr_hwaddr.sa_data, mac, 6) == 0)
        return 0;
    memcpy(r.ifr_hwaddr.sa_data, mac, 6);
    if (ioctl(card.inet, SIOCSIFHWADDR, &r) == 0)
        return 0;
    int error = errno == EBUSY ? set_up(false) : errno; /* a card that cannot change it while it is up */
    return error ? error : ioctl(card.inet, SIOCSIFHWADDR, &r) < 0 ? errno : 0;
}

static int set_mtu(uint32_t mtu)
{
    struct ifreq r = about_card();
    r.ifr_mtu = (int)mtu;
    return ioctl(card.inet, SIOCSIFMTU, &r) < 0 ? errno : 0;
}

static int change_address(uint16_t type, struct ipv4 ip)
{
    struct message m;
    struct ifaddrmsg *info = prepare(&m, type, type == RTM_NEWADDR ? NLM_F_CREATE | NLM_F_REPLACE : 0, sizeof *info);
    info->ifa_family = AF_INET;
    info->ifa_prefixlen = ip.prefix;
    info->ifa_index = (unsigned)card.index;
    add(&m, IFA_LOCAL, &ip.address, 4);
    add(&m, IFA_ADDRESS, &ip.address, 4);
    if (type == RTM_NEWADDR && ip.prefix < 31) {
        uint32_t broadcast = ip.address | htonl((uint32_t)(0xffffffffu >> ip.prefix));
        add(&m, IFA_BROADCAST, &broadcast, 4);
    }
    return request(&m);
}

static bool has_address(struct ipv4 ip)
{
    struct ifreq r = about_card();
    if (ip.address != card.address.address || ip.prefix != card.address.prefix || ioctl(card.inet, SIOCGIFADDR, &r) < 0)
        return false;
    return ((const struct sockaddr_in *)&r.ifr_addr)->sin_addr.s_addr == ip.address;
}

static int set_address(struct ipv4 ip)
{
    struct addresses found = {0};
    int error = dump(RTM_GETADDR, &found);
    for (size_t i = 0; !error && i < found.count; i++) {
        error = change_address(RTM_DELADDR, found.item[i]);
        if (error == EADDRNOTAVAIL) /* it went together with another one of its network */
            error = 0;
    }
    if (!error)
        error = change_address(RTM_NEWADDR, ip);
    if (!error)
        card.address = ip;
    card.gateway = 0; /* the route went with the address */
    return error;
}

static int set_gateway(uint32_t gateway)
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
    add(&m, RTA_OIF, &card.index, sizeof card.index);
    int error = request(&m);
    if (!error)
        card.gateway = gateway;
    return error;
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

int network_set(const struct network *n)
{
    struct ipv4 ip = {0}, gateway = {0};
    if ((n->address && !parse_address(n->address, &ip)) || (n->gateway && !parse_address(n->gateway, &gateway)))
        return EINVAL;
    int error = card.index ? 0 : find_card();
    if (!error && n->mac)
        error = set_mac(n->mac);
    if (!error && n->mtu)
        error = set_mtu(n->mtu);
    if (!error && n->address && !has_address(ip))
        error = set_address(ip);
    if (!error)
        error = set_up(true);
    if (!error && n->gateway && gateway.address != card.gateway)
        error = set_gateway(gateway.address);
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
