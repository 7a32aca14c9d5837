/* Entry point: PID 1 of a guest, or the server of one connection, or of one listening socket, that a test passes. */
#define _GNU_SOURCE
#include "machine.h"
#include "spawn.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <unistd.h>

#define FILES 8192

static struct machine machine; /* not initialised here: its buffers would be in the binary */

static void watch_children(void)
{
    sigset_t blocked;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGCHLD);
    machine.children = signalfd(-1, &blocked, SFD_CLOEXEC | SFD_NONBLOCK);
    sigprocmask(SIG_BLOCK, &blocked, NULL);
}

static _Noreturn void serve_socket(int fd, bool listens)
{
    machine.confined = true;
    machine.overlay = machine.random = -1;
    machine.wire_count = 1;
    group_root = getenv("COPPICE_AGENT_CGROUP");
    watch_children();
    char *test = getenv("COPPICE_AGENT_PROCESS"), *argv[] = {"/bin/sh", "-c", test, NULL};
    if (test && process_start(&(struct spawn){.argv = argv, .env = environ, .cwd = "/", .account = &(struct account){.uid = geteuid()}}, "") != 0)
        exit(1);
    if (fcntl(fd, F_SETFD, FD_CLOEXEC) < 0 || (listens && fcntl(fd, F_SETFL, O_NONBLOCK) < 0) ||
        !wire_open(machine.wires, listens ? -1 : fd, listens ? fd : -1, false)) {
        say("descriptor %d: %s", fd, strerror(errno));
        exit(1);
    }
    serve(&machine);
}

/* Many commands have many descriptors. They themselves get the usual limit. */
static void raise_limit(void)
{
    struct rlimit files;
    if (getrlimit(RLIMIT_NOFILE, &files) < 0)
        return;
    spawn_files = files.rlim_cur;
    files.rlim_cur = files.rlim_max < FILES ? files.rlim_max : FILES;
    setrlimit(RLIMIT_NOFILE, &files);
}

static _Noreturn void run_guest(void)
{
    machine.overlay = boot();
    raise_limit();
    watch_children();
    machine.random = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    if (access("/sys/fs/cgroup/cgroup.procs", F_OK) == 0)
        group_root = "/sys/fs/cgroup/coppice";
    struct port ports[PORT_COUNT];
    if (!ports_find(ports)) {
        say("the host offers no control port");
        reboot(RB_AUTOBOOT);
    }
    for (size_t i = 0; i < PORT_COUNT; i++) {
        bool listens = ports[i].listener >= 0;
        if (!listens && !ports[i].path[0])
            continue;
        if (wire_open(&machine.wires[machine.wire_count], listens ? -1 : port_open(&ports[i]), ports[i].listener, !listens))
            machine.wire_count++;
        else
            say("port %zu: %s", i, strerror(errno));
    }
    serve(&machine);
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    umask(0);
    if (argc == 3 && strcmp(argv[1], "--serve") == 0)
        serve_socket(atoi(argv[2]), false);
    if (argc == 3 && strcmp(argv[1], "--listen") == 0)
        serve_socket(atoi(argv[2]), true);
    if (getpid() == 1)
        run_guest();
    fprintf(stderr, "usage: coppice-agent --serve FD | --listen FD (else it is PID 1 of a guest)\n");
    return 2;
}
