/* Trees of files as a stream of records: `kind: u8 | length: u32 | payload`. */
#ifndef COPPICE_TREE_H
#define COPPICE_TREE_H

#include "helper.h"

#include <sys/stat.h>

enum record {
    ENTRY = 1,    /* TLV of the tags below; SIZE if it is known before the content */
    CONTENT = 2,  /* u64 offset, then bytes of the file that the last ENTRY began, in order */
    END_FILE = 3, /* u64 true length of that file */
    END_TREE = 4,
    EVENT = 5, /* TLV PATH, the mask and the cookie of inotify; mask 0: the watch has begun */
};

enum status_tag { KIND = 1, SIZE, MODE, UID, GID, MTIME, LINK, PATH, MAJOR, MINOR };

#define HARD_LINK 'h' /* the kind of a further name of a file of this tree; LINK is its first name */
#define RECORD_HEADER 5
#define RECORD_PAYLOAD_MAX 65536

/* ---- status.c ---- */

char status_kind(const struct stat *s);
void status_put(struct reply *r, char kind, const struct stat *s); /* all but SIZE, LINK and PATH */

/* ---- records.c: to the host. If it is gone, the process ends. ---- */

uint8_t *record_space(size_t least, size_t *size); /* for a payload of at least this size */
void record_commit(enum record kind, size_t size); /* the payload has been written there */
void record_put(enum record kind, const struct reply *payload);
void record_flush(void);

/* ---- below.c: paths below a directory, which is resolved as if it were the root ---- */

bool below_normalise(char *name); /* make a path relative, without empty and "." components; false if one is ".." */
char *below_base(char *path);     /* the last component of a normalised path */
int below_open(int root, const char *path);                /* a directory, O_PATH; -1 with errno */
int below_parent(int root, char *path, bool make_missing); /* of a normalised path, O_PATH; -1 with errno */

#endif
