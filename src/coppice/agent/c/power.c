/* Shut the machine down: processes, file systems, power. */
#include "machine.h"

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

/* Wait until this is the only process. All others become children of PID 1 once their parents have
 * ended. */
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
    /* The disk of a frozen file system is as clean as that of one mounted read-only. */
    if (mount(NULL, path, NULL, MS_REMOUNT | MS_RDONLY, NULL) < 0 && ioctl(m->overlay, FIFREEZE, 0) < 0)
        say("the overlay's disk needs its journal at the next start");
}

void power_off(struct machine *m, struct wire *answered, uint64_t grace_ms)
{
    for (int64_t end = now_ms() + ANSWER_MS; answered->out_end > 0 && !answered->over && now_ms() < end;) {
        wire_flush(answered);
        struct pollfd event = {.fd = answered->epoll, .events = POLLIN};
        if (answered->out_end > 0 && poll(&event, 1, (int)(end - now_ms())) > 0)
            wire_event(answered);
    }
    thaw(m);
    kill(-1, SIGTERM);
    kill(-1, SIGCONT);
    if (!wait_for_all(deadline_in(grace_ms))) {
        kill(-1, SIGKILL);
        wait_for_all(now_ms() + KILLED_MS);
    }
    close_file_systems(m);
    /* A reset ends the machine in any VMM (QEMU with -no-reboot, Firecracker always). A power-off
     * would only halt it if the VMM has no ACPI power management. */
    reboot(RB_AUTOBOOT);
    reboot(RB_POWER_OFF);
}
