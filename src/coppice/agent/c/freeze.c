/* Freeze the overlay's file system for a capture, and set the clock after it. */
#include "machine.h"

#include <errno.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <time.h>

#define FREEZE_MAX_MS 60000
#define NS_PER_S 1000000000u

/* The agent must not write to the overlay while it is frozen: it would wait for itself. */
int freeze(struct machine *m, uint64_t timeout_ms)
{
    if (m->overlay < 0)
        return EOPNOTSUPP;
    group_ahead(); /* the first command of each fork finds its group made */
    if (ioctl(m->overlay, FIFREEZE, 0) < 0 && errno != EBUSY) /* EBUSY: already frozen */
        return errno;
    m->thaw_at = now_ms() + (int64_t)(timeout_ms && timeout_ms < FREEZE_MAX_MS ? timeout_ms : FREEZE_MAX_MS);
    return 0;
}

int thaw(struct machine *m)
{
    m->thaw_at = 0;
    return m->overlay >= 0 && ioctl(m->overlay, FITHAW, 0) < 0 && errno != EINVAL ? errno : 0; /* EINVAL: not frozen */
}

int clock_set(uint64_t ns)
{
    struct timespec t = {.tv_sec = (time_t)(ns / NS_PER_S), .tv_nsec = (long)(ns % NS_PER_S)};
    return clock_settime(CLOCK_REALTIME, &t) < 0 ? errno : 0;
}
