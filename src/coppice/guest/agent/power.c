/* The end of the machine: processes, file systems, power. */
#include "agent.h"

#include <errno.h>
#include <linux/fs.h>
#include <signal.h>
#include <stdio.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <unistd.h>

#define KILLED_MS 1000
#define ANSWER_MS 500

/* Until there is no process but this one. All others are children of PID 1 once their parents are gone. */
static bool wait_for_all(int64_t deadline)
{
    sigset_t child;
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    for (;;) {
        pid_t pid = waitpid(-1, NULL, WNOHANG);
        if (pid < 0 && errno == ECHILD)
            return true;
        int64_t left = deadline - now_ms();
        if (left <= 0)
            return false;
        struct timespec limit = {left / 1000, left % 1000 * 1000000L};
        if (pid == 0)
            sigtimedwait(&child, NULL, &limit);
    }
}

static void close_file_systems(struct machine *m)
{
    char path[32];
    snprintf(path, sizeof path, "/proc/self/fd/%d", m->overlay);
    sync();
    while (m->mounted_count > 0)
        volume_unmount(m->mounted[--m->mounted_count]);
    mount(NULL, "/", NULL, MS_REMOUNT | MS_RDONLY, NULL);
    /* A frozen file system is as clean on its disk as one that is mounted read-only. */
    if (mount(NULL, path, NULL, MS_REMOUNT | MS_RDONLY, NULL) < 0 && ioctl(m->overlay, FIFREEZE, 0) < 0)
        say("the overlay's disk needs its journal at the next start");
}

void power_off(struct machine *m, uint64_t grace_ms)
{
    for (int64_t end = now_ms() + ANSWER_MS; m->wire.out_end > 0 && !m->wire.over && now_ms() < end;) {
        wire_flush(&m->wire);
        if (m->wire.out_end > 0)
            wire_wait(&m->wire, NULL, 0, end);
    }
    thaw(m);
    kill(-1, SIGTERM);
    kill(-1, SIGCONT);
    if (!wait_for_all(now_ms() + (int64_t)(grace_ms < INT_MAX ? grace_ms : INT_MAX))) {
        kill(-1, SIGKILL);
        wait_for_all(now_ms() + KILLED_MS);
    }
    close_file_systems(m);
    /* A reset, not a power-off: a VMM without ACPI's power button would leave the machine halted, and a reset ends it in any case
     * (QEMU with -no-reboot, Firecracker always). */
    reboot(RB_AUTOBOOT);
    reboot(RB_POWER_OFF);
}
