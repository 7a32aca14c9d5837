/* Requests to the kernel about links, addresses and routes. */
#ifndef COPPICE_RTNETLINK_H
#define COPPICE_RTNETLINK_H

#include "base.h"

#include <linux/rtnetlink.h>

struct message {
    struct nlmsghdr header;
    char body[512];
};

void *nl_prepare(struct message *m, uint16_t type, uint16_t flags, size_t size); /* the body of `size` bytes, all zero */
void nl_add(struct message *m, uint16_t type, const void *value, size_t size);   /* an attribute */
int nl_send(int rtnetlink, struct message *m);                                   /* 0 or an errno */
int nl_request(int rtnetlink, struct message *m);                                /* and wait for the kernel's answer */

#endif
