/* The machine's identity as its programs see it: names, name servers, network card. */
#ifndef COPPICE_SELF_H
#define COPPICE_SELF_H

#include "base.h"

/* ---- etc.c: the files; 0 or an errno ---- */

extern const char boot_id_path[];
void mount_own_files(void);
int put_file(const char *path, const char *data, size_t size, mode_t mode);
int put_line(const char *path, const char *text, mode_t mode);
int put_hosts(const char *hostname);
int put_resolv_conf(const char *text); /* unless another program has changed it */
int remove_file(const char *path);     /* which may be missing */

/* ---- certificates.c; 0 or an errno ---- */

int trust_certificate(const char *pem, size_t number); /* number: among those of this machine */

/* ---- network.c: the first network card ---- */

struct network {
    const uint8_t *mac; /* 6 bytes, or NULL */
    const char *address, *gateway;
    const char *address6, *gateway6;
    uint32_t mtu; /* 0: keep it */
};

int network_set(const struct network *n); /* 0 or an errno; after an error the card is unchanged */
void link_up_loopback(void);

/* ---- network6.c: its IPv6 ---- */

int network6_set(int rtnetlink, int index, const char *card, const struct network *n, bool was_down); /* likewise */

#endif
