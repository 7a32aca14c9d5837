/* random.c: random generators inside processes, which forks would share. */
#ifndef COPPICE_RANDOM_H
#define COPPICE_RANDOM_H

#include "wire.h"

void place_guest_files(int directory); /* into /run/coppice, from a directory of the initramfs, which is emptied and closed */
void refuse_wiped_pages(void);         /* to this process, and to all that it starts */
void next_generation(void);            /* tell programs that watch /dev/sysgenid */
int shared_random(struct reply *r);    /* a text of tag 1 for each process with such a generator; 0 or an errno */

#endif
