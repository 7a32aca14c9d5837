/* Requests to the kernel about links, addresses and routes. */
#include "rtnetlink.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>

void *nl_prepare(struct message *m, uint16_t type, uint16_t flags, size_t size)
{
    memset(m, 0, sizeof *m);
    m->header.nlmsg_type = type;
    m->header.nlmsg_flags = (uint16_t)(NLM_F_REQUEST | flags);
    m->header.nlmsg_len = (uint32_t)NLMSG_LENGTH(size);
    return NLMSG_DATA(&m->header);
}

void nl_add(struct message *m, uint16_t type, const void *value, size_t size)
{
    struct rtattr *a = (struct rtattr *)((char *)m + NLMSG_ALIGN(m->header.nlmsg_len));
    a->rta_type = type;
    a->rta_len = (uint16_t)RTA_LENGTH(size);
    memcpy(RTA_DATA(a), value, size);
    m->header.nlmsg_len = (uint32_t)(NLMSG_ALIGN(m->header.nlmsg_len) + RTA_ALIGN(a->rta_len));
}

int nl_send(int rtnetlink, struct message *m)
{
    return send(rtnetlink, m, m->header.nlmsg_len, 0) < 0 ? errno : 0;
}

int nl_request(int rtnetlink, struct message *m)
{
    m->header.nlmsg_flags |= NLM_F_ACK;
    int error = nl_send(rtnetlink, m);
    char buffer[4096] __attribute__((aligned(NLMSG_ALIGNTO)));
    while (!error) {
        ssize_t size = recv(rtnetlink, buffer, sizeof buffer, 0);
        if (size < 0)
            return errno;
        const struct nlmsghdr *h = (const struct nlmsghdr *)buffer;
        if (NLMSG_OK(h, (size_t)size) && h->nlmsg_type == NLMSG_ERROR)
            return -((const struct nlmsgerr *)NLMSG_DATA(h))->error;
    }
    return error;
}
