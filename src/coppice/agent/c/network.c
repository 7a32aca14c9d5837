/* The first network card: its MAC, address, gateway and MTU.
 *
 * Some changes remove other settings. A card that cannot change its MAC while it is up must be set
 * down, and loses its routes. A new address replaces the old ones. The removed settings are copied
 * first, and restored if the change fails. */
#include "rtnetlink.h"
#include "self.h"

#include <arpa/inet.h>
#include <errno.h>
#include <net/if.h>
#include <net/if_arp.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

struct ipv4 {
    uint32_t address;
    uint8_t prefix;
};

struct records { /* of a dump; each is a complete message of the kernel */
    uint8_t *data;
    size_t size;
};

/* The latest settings. Forks and restored machines inherit them with the memory. A setting that the
 * host repeats is not set again: it is unchanged, or the machine's owner has changed it. Under
 * emulation that also saves time. */
static struct {
    int rtnetlink, inet; /* sockets */
    int index;           /* of the card; 0: not searched yet */
    char name[IFNAMSIZ];
    bool is_set, has_mac; /* whether the card was set before; whether `mac` was */
    uint8_t mac[6];
    struct ipv4 address;
    uint32_t gateway;
} card = {.rtnetlink = -1, .inet = -1};

/* ---- the present settings ---- */

/* Find the first Ethernet card. */
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

static bool keep(struct records *r, const struct nlmsghdr *h)
{
    uint8_t *grown = realloc(r->data, r->size + NLMSG_ALIGN(h->nlmsg_len));
    if (!grown)
        return false;
    memcpy(grown + r->size, h, h->nlmsg_len);
    r->data = grown;
    r->size += NLMSG_ALIGN(h->nlmsg_len);
    return true;
}

static bool is_address_of_card(const struct nlmsghdr *h)
{
    const struct ifaddrmsg *info = NLMSG_DATA(h);
    return h->nlmsg_type == RTM_NEWADDR && (int)info->ifa_index == card.index && info->ifa_family == AF_INET;
}

/* Return whether a route was added by a program: the kernel itself restores those to the card's own
 * network. */
static bool is_route_of_card(const struct nlmsghdr *h)
{
    const struct rtmsg *route = NLMSG_DATA(h);
    if (h->nlmsg_type != RTM_NEWROUTE || route->rtm_family != AF_INET || route->rtm_protocol == RTPROT_KERNEL || route->rtm_flags & RTM_F_CLONED)
        return false;
    int left = (int)RTM_PAYLOAD(h);
    for (const struct rtattr *a = RTM_RTA(route); RTA_OK(a, left); a = RTA_NEXT(a, left)) {
        if (a->rta_type == RTA_OIF)
            return memcmp(RTA_DATA(a), &card.index, sizeof card.index) == 0;
    }
    return false;
}

/* Ask the kernel for all links, addresses or routes. Store those of the card in `records`, if
 * given. */
static int dump(uint16_t type, struct records *records)
{
    struct message m;
    struct rtgenmsg *generic = nl_prepare(&m, type, NLM_F_DUMP, sizeof *generic);
    generic->rtgen_family = type == RTM_GETLINK ? AF_UNSPEC : AF_INET;
    int error = nl_send(card.rtnetlink, &m);
    char buffer[32768] __attribute__((aligned(NLMSG_ALIGNTO)));
    while (!error) {
        ssize_t size = recv(card.rtnetlink, buffer, sizeof buffer, 0);
        if (size < 0)
            return errno;
        unsigned left = (unsigned)size;
        for (const struct nlmsghdr *h = (const struct nlmsghdr *)buffer; NLMSG_OK(h, left); h = NLMSG_NEXT(h, left)) {
            if (h->nlmsg_type == NLMSG_DONE)
                return error;
            if (h->nlmsg_type == NLMSG_ERROR)
                return -((const struct nlmsgerr *)NLMSG_DATA(h))->error;
            if (h->nlmsg_type == RTM_NEWLINK)
                note_link(h);
            if (records && (is_address_of_card(h) || is_route_of_card(h)) && !keep(records, h))
                error = ENOMEM;
        }
    }
    return error;
}

/* Send all records to the kernel as requests of type `type`. Return the first error except
 * `harmless`. */
static int replay(const struct records *records, uint16_t type, uint16_t flags, int harmless)
{
    int error = 0;
    for (size_t at = 0; at < records->size;) {
        struct message m = {0};
        const struct nlmsghdr *h = (const struct nlmsghdr *)(records->data + at);
        int failed = h->nlmsg_len > sizeof m ? EMSGSIZE : 0;
        if (!failed) {
            memcpy(&m, h, h->nlmsg_len);
            m.header.nlmsg_type = type;
            m.header.nlmsg_flags = (uint16_t)(NLM_F_REQUEST | flags);
            if (type == RTM_NEWROUTE)
                ((struct rtmsg *)NLMSG_DATA(&m.header))->rtm_flags &= RTNH_F_ONLINK; /* the other flags only report its state */
            failed = nl_request(card.rtnetlink, &m);
        }
        if (!error && failed != harmless)
            error = failed;
        at += NLMSG_ALIGN(h->nlmsg_len);
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

/* ---- settings that a change removes ---- */

/* The changes made, and the card's settings before. Addresses and routes are read only before a
 * change that removes them: most forks need neither, and reading them is slow under emulation. */
struct before {
    bool set_down, readdressed, has_mac, has_mtu, has_flags, has_records;
    struct ifreq mac, mtu, flags;
    struct ipv4 address;
    uint32_t gateway;
    struct records addresses, routes;
};

static int remember(struct before *b)
{
    int error = b->has_records ? 0 : dump(RTM_GETADDR, &b->addresses);
    if (!error && !b->has_records)
        error = dump(RTM_GETROUTE, &b->routes);
    b->has_records |= !error;
    return error;
}

static int put_back_routes(const struct before *b)
{
    int error = replay(&b->routes, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, EEXIST);
    return error ? replay(&b->routes, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, EEXIST) : 0; /* one may lead through another */
}

/* ---- the new settings ---- */

static struct ifreq about_card(void)
{
    struct ifreq r = {0};
    memcpy(r.ifr_name, card.name, sizeof r.ifr_name);
    return r;
}

static int set_up(bool up, struct before *b)
{
    struct ifreq r = about_card();
    if (ioctl(card.inet, SIOCGIFFLAGS, &r) < 0)
        return errno;
    if (!b->has_flags)
        b->flags = r;
    b->has_flags = true;
    if (!(r.ifr_flags & IFF_UP) == !up)
        return 0;
    r.ifr_flags = (short)(r.ifr_flags ^ IFF_UP);
    return ioctl(card.inet, SIOCSIFFLAGS, &r) < 0 ? errno : 0;
}

static int change_mac(struct ifreq *r, struct before *b)
{
    int error = ioctl(card.inet, SIOCSIFHWADDR, r) < 0 ? errno : 0;
    if (error == EBUSY) { /* the card cannot change its MAC while it is up */
        error = remember(b);
        if (!error) {
            b->set_down = true;
            error = set_up(false, b);
        }
        if (!error && ioctl(card.inet, SIOCSIFHWADDR, r) < 0)
            error = errno;
    }
    b->has_mac |= !error;
    return error;
}

/* The kernel drops its neighbour entries when the MAC changes. */
static int set_mac(const uint8_t *mac, struct before *b)
{
    struct ifreq r = about_card();
    if (ioctl(card.inet, SIOCGIFHWADDR, &r) < 0)
        return errno;
    if (memcmp(r.ifr_hwaddr.sa_data, mac, 6) == 0)
        return 0;
    b->mac = r;
    memcpy(r.ifr_hwaddr.sa_data, mac, 6);
    return change_mac(&r, b);
}

static int set_mtu(uint32_t mtu, struct before *b)
{
    struct ifreq r = about_card();
    if (ioctl(card.inet, SIOCGIFMTU, &r) < 0)
        return errno;
    b->mtu = r;
    r.ifr_mtu = (int)mtu;
    if (ioctl(card.inet, SIOCSIFMTU, &r) < 0)
        return errno;
    b->has_mtu = true;
    return 0;
}

static int add_address(struct ipv4 ip)
{
    struct message m;
    struct ifaddrmsg *info = nl_prepare(&m, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, sizeof *info);
    info->ifa_family = AF_INET;
    info->ifa_prefixlen = ip.prefix;
    info->ifa_index = (unsigned)card.index;
    nl_add(&m, IFA_LOCAL, &ip.address, 4);
    nl_add(&m, IFA_ADDRESS, &ip.address, 4);
    if (ip.prefix < 31) {
        uint32_t broadcast = ip.address | htonl((uint32_t)(0xffffffffu >> ip.prefix));
        nl_add(&m, IFA_BROADCAST, &broadcast, 4);
    }
    return nl_request(card.rtnetlink, &m);
}

static int set_address(struct ipv4 ip, struct before *b)
{
    int error = remember(b);
    if (error)
        return error;
    b->readdressed = true;
    b->address = card.address;
    b->gateway = card.gateway;
    error = replay(&b->addresses, RTM_DELADDR, 0, EADDRNOTAVAIL); /* removing one may remove others of its network */
    if (!error)
        error = add_address(ip);
    if (!error)
        card.address = ip;
    card.gateway = 0; /* the kernel removed the route with the address */
    return error;
}

static int set_gateway(uint32_t gateway)
{
    struct message m;
    struct rtmsg *route = nl_prepare(&m, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, sizeof *route);
    route->rtm_family = AF_INET;
    route->rtm_table = RT_TABLE_MAIN;
    route->rtm_protocol = RTPROT_BOOT;
    route->rtm_scope = RT_SCOPE_UNIVERSE;
    route->rtm_type = RTN_UNICAST;
    route->rtm_flags = RTNH_F_ONLINK; /* a gateway may be outside the prefix: a /32 behind a tap device */
    nl_add(&m, RTA_GATEWAY, &gateway, 4);
    nl_add(&m, RTA_OIF, &card.index, sizeof card.index);
    int error = nl_request(card.rtnetlink, &m);
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

/* Address and gateway were stored when they were set. */
static void remember_success(const uint8_t *mac)
{
    card.is_set = true;
    card.has_mac |= mac != NULL;
    if (mac)
        memcpy(card.mac, mac, sizeof card.mac);
}

static int change(const struct network *n, struct ipv4 ip, uint32_t gateway, struct before *b)
{
    bool has_mac = !n->mac || (card.has_mac && memcmp(card.mac, n->mac, sizeof card.mac) == 0);
    int error = has_mac ? 0 : set_mac(n->mac, b);
    if (!error && n->mtu)
        error = set_mtu(n->mtu, b);
    if (!error && n->address && (ip.address != card.address.address || ip.prefix != card.address.prefix))
        error = set_address(ip, b);
    if (!error && (!card.is_set || b->set_down || b->readdressed))
        error = set_up(true, b);
    if (!error && b->set_down && !b->readdressed)
        error = put_back_routes(b);
    if (!error && n->gateway && gateway != card.gateway)
        error = set_gateway(gateway);
    if (!error && n->address6)
        error = network6_set(card.rtnetlink, card.index, card.name, n, b->set_down);
    return error;
}

static int put_back_addresses(struct before *b)
{
    struct records now = {0};
    int error = dump(RTM_GETADDR, &now);
    if (!error)
        error = replay(&now, RTM_DELADDR, 0, EADDRNOTAVAIL);
    free(now.data);
    card.address = b->address;
    card.gateway = b->gateway;
    return error ? error : replay(&b->addresses, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, EEXIST);
}

/* Restore the card's settings after a failed change. */
static void put_back(struct before *b)
{
    int error = b->has_mac ? change_mac(&b->mac, b) : 0;
    if (b->has_mtu && ioctl(card.inet, SIOCSIFMTU, &b->mtu) < 0 && !error)
        error = errno;
    int failed = b->readdressed ? put_back_addresses(b) : 0;
    error = error ? error : failed;
    failed = b->has_flags ? set_up(b->flags.ifr_flags & IFF_UP, b) : 0;
    error = error ? error : failed;
    bool is_up = !b->has_flags || b->flags.ifr_flags & IFF_UP;
    failed = b->has_records && is_up ? put_back_routes(b) : 0;
    error = error ? error : failed;
    if (error)
        say("%s is not as it was: %s", card.name, strerror(error));
}

int network_set(const struct network *n)
{
    struct ipv4 ip = {0}, gateway = {0};
    struct before before = {0};
    if (!n->mac && !n->address && !n->gateway && !n->mtu && !n->address6)
        return 0;
    if ((n->address && !parse_address(n->address, &ip)) || (n->gateway && !parse_address(n->gateway, &gateway)))
        return EINVAL;
    int error = card.index ? 0 : find_card();
    if (!error) {
        error = change(n, ip, gateway.address, &before);
        if (error)
            put_back(&before);
        else
            remember_success(n->mac);
    }
    free(before.addresses.data);
    free(before.routes.data);
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
