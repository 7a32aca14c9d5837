/* output.c: the latest output of a command, kept for clients that attach later. */
#ifndef COPPICE_OUTPUT_H
#define COPPICE_OUTPUT_H

#include "base.h"

/* Records of a kind and up to RECORD_MAX bytes. Positions count the bytes of records from the
 * beginning, so they stay right when old records are dropped. Offsets count the contents alone. */
struct output {
    uint8_t *data;
    size_t start, end, capacity;
    size_t last;           /* the last record; valid unless start == end */
    uint64_t base;         /* position of data[0] */
    uint64_t first, total; /* offsets of the first byte that is kept, and of the next byte to come */
};

struct cursor { /* a client's place in it */
    uint64_t position; /* of a record */
    uint64_t offset;   /* of the next byte to send */
    uint32_t skip;     /* bytes of the record that were sent */
};

struct piece {
    uint8_t kind;
    const uint8_t *data;
    size_t size;
};

#define RECORD_MAX 32768

/* Return space for one record's contents, dropping the oldest records beyond `bound`; NULL: no
 * memory. */
uint8_t *output_reserve(struct output *o, size_t bound);
void output_commit(struct output *o, uint8_t kind, size_t size);
void output_free(struct output *o);
/* Begin at an offset; return how many bytes from there on were dropped already. */
uint64_t output_seek(const struct output *o, uint64_t offset, struct cursor *c);
bool output_next(const struct output *o, const struct cursor *c, struct piece *p); /* false: everything was sent */
void output_advance(const struct output *o, struct cursor *c, size_t size);

#endif
