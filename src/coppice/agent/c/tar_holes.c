/* Holes of files in archives: find them, and write and read their map. */
#define _GNU_SOURCE
#include "tar.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define HOLE_MIN 65536 /* smaller holes are sent as zeros */

size_t tar_find_ranges(int fd, uint64_t size, struct range *ranges)
{
    for (uint64_t least = HOLE_MIN;; least *= 4) {
        size_t n = 0;
        off_t data, hole = 0;
        while ((data = lseek(fd, hole, SEEK_DATA)) >= 0 && (uint64_t)data < size && n < RANGES_MAX - 1) {
            uint64_t at = (uint64_t)data, end = n > 0 ? ranges[n - 1].at + ranges[n - 1].size : 0;
            hole = lseek(fd, data, SEEK_HOLE);
            if (hole < 0)
                break;
            if (n == 0 || at - end >= least)
                ranges[n++].at = at;
            ranges[n - 1].size = ((uint64_t)hole < size ? (uint64_t)hole : size) - ranges[n - 1].at;
        }
        if (hole < 0 || (data < 0 && errno != ENXIO)) { /* the file system cannot report holes */
            ranges[0] = (struct range){0, size};
            n = 1;
        } else if (n == RANGES_MAX - 1) {
            continue;
        }
        ranges[n++] = (struct range){size, 0};
        return n;
    }
}

void tar_map(const struct range *ranges, size_t count, char *text)
{
    size_t used = 0;
    for (size_t i = 0; i < count; i++)
        used += (size_t)snprintf(text + used, MAP_MAX - used, "%s%llu,%llu", i > 0 ? "," : "", (unsigned long long)ranges[i].at,
                                 (unsigned long long)ranges[i].size);
}

size_t tar_read_map(const char *text, struct range *ranges)
{
    for (size_t count = 0; count < RANGES_MAX; count++) {
        uint64_t *numbers[] = {&ranges[count].at, &ranges[count].size};
        for (size_t i = 0; i < 2; i++) {
            char *end;
            errno = 0;
            *numbers[i] = strtoull(text, &end, 10);
            if (end == text || errno)
                return 0;
            if (i == 1 && *end == 0)
                return count + 1;
            if (*end != ',')
                return 0;
            text = end + 1;
        }
    }
    return 0;
}
