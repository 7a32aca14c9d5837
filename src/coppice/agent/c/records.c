/* Records for the host, collected to chunks. */
#include "tree.h"

#include <string.h>
#include <unistd.h>

static uint8_t chunk[65536];
static size_t used;

void record_flush(void)
{
    if (!helper_put(chunk, used))
        _exit(0); /* the host is gone */
    used = 0;
}

uint8_t *record_space(size_t least, size_t *size)
{
    if (sizeof chunk - used < RECORD_HEADER + least)
        record_flush();
    *size = sizeof chunk - used - RECORD_HEADER;
    return chunk + used + RECORD_HEADER;
}

void record_commit(enum record kind, size_t size)
{
    chunk[used] = kind;
    store_u32(chunk + used + 1, (uint32_t)size);
    used += RECORD_HEADER + size;
}

void record_put(enum record kind, const struct reply *payload)
{
    size_t size;
    memcpy(record_space(payload->size, &size), payload->data, payload->size);
    record_commit(kind, payload->size);
}
