/* The IPv6 address of the card, which only the host sets. An address that the kernel derives from
 * the first MAC would be the same in every fork. So IPv6 is off on the card until the host sets an
 * address, and then the kernel derives none. */
#include "rtnetlink.h"
#include "self.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct ipv6 {
    struct in6_addr address;
    uint8_t prefix;
};

/* The latest settings. Forks and restored machines inherit them with the memory. */
static struct {
    bool is_set;
    struct ipv6 ip;
    struct in6_addr gateway;
} set;

static void knob(const char *card, const char *name, const char *value)
{
    char path[128];
    if (snprintf(path, sizeof path, "/proc/sys/net/ipv6/conf/%s/%s", card, name) < (int)sizeof path)
        sys_write(path, value);
}

static int change_address(int rtnetlink, int index, uint16_t type, struct ipv6 ip)
{
    struct message m;
    struct ifaddrmsg *info = nl_prepare(&m, type, type == RTM_NEWADDR ? NLM_F_CREATE | NLM_F_REPLACE : 0, sizeof *info);
    info->ifa_family = AF_INET6;
    info->ifa_prefixlen = ip.prefix;
    info->ifa_flags = IFA_F_NODAD; /* no other machine is on the card's network */
    info->ifa_index = (unsigned)index;
    nl_add(&m, IFA_LOCAL, &ip.address, sizeof ip.address);
    return nl_request(rtnetlink, &m);
}

static int add_gateway(int rtnetlink, int index, struct in6_addr gateway)
{
    struct message m;
    struct rtmsg *route = nl_prepare(&m, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, sizeof *route);
    route->rtm_family = AF_INET6;
    route->rtm_table = RT_TABLE_MAIN;
    route->rtm_protocol = RTPROT_BOOT;
    route->rtm_type = RTN_UNICAST;
    nl_add(&m, RTA_GATEWAY, &gateway, sizeof gateway);
    nl_add(&m, RTA_OIF, &index, sizeof index);
    return nl_request(rtnetlink, &m);
}

static bool parse(const char *text, struct ipv6 *ip)
{
    char address[INET6_ADDRSTRLEN];
    const char *slash = strchr(text, '/');
    size_t size = slash ? (size_t)(slash - text) : strlen(text);
    if (size >= sizeof address)
        return false;
    memcpy(address, text, size);
    address[size] = 0;
    char *end = NULL;
    unsigned long prefix = slash ? strtoul(slash + 1, &end, 10) : 128;
    ip->prefix = (uint8_t)prefix;
    return inet_pton(AF_INET6, address, &ip->address) == 1 && prefix <= 128 && (!end || (end != slash + 1 && *end == 0));
}

int network6_set(int rtnetlink, int index, const char *card, const struct network *n, bool was_down)
{
    struct ipv6 ip = {0}, gateway = {0};
    if (!parse(n->address6, &ip) || (n->gateway6 && !parse(n->gateway6, &gateway)))
        return EINVAL;
    bool same = set.is_set && memcmp(&ip, &set.ip, sizeof ip) == 0 && memcmp(&gateway.address, &set.gateway, sizeof set.gateway) == 0;
    if (access("/proc/sys/net/ipv6", F_OK) < 0 || (same && !was_down)) /* without IPv6 there are no addresses */
        return 0;
    if (!set.is_set) {
        knob(card, "accept_ra", "0");
        knob(card, "addr_gen_mode", "1");
        knob(card, "keep_addr_on_down", "1");
        knob(card, "disable_ipv6", "0");
    } else if (!same) {
        change_address(rtnetlink, index, RTM_DELADDR, set.ip);
    }
    int error = change_address(rtnetlink, index, RTM_NEWADDR, ip);
    if (!error && n->gateway6)
        error = add_gateway(rtnetlink, index, gateway.address);
    if (error && !set.is_set)
        knob(card, "disable_ipv6", "1");
    else if (error && !same && change_address(rtnetlink, index, RTM_NEWADDR, set.ip) == 0)
        add_gateway(rtnetlink, index, set.gateway);
    if (error)
        return error;
    set.ip = ip;
    set.gateway = gateway.address;
    set.is_set = true;
    return 0;
}
