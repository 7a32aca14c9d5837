/* Which of its parts the program is: PID 1 of a guest, or one port's server on a socket that a test handed to it. */
#define _GNU_SOURCE
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <unistd.h>

static struct machine machine = {.overlay = -1, .random = -1, .children = -1};

static struct shared *share(void)
{
    struct shared *shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (shared == MAP_FAILED) {
        say("shared memory: %s", strerror(errno));
        exit(1);
    }
    return shared;
}

static _Noreturn void serve_socket(int fd, bool control)
{
    if (fcntl(fd, F_SETFD, FD_CLOEXEC) < 0) {
        say("descriptor %d: %s", fd, strerror(errno));
        exit(1);
    }
    machine.shared = share();
    machine.confined = true;
    if (!wire_open(&machine.wire, fd, -1, false, -1)) {
        say("descriptor %d: %s", fd, strerror(errno));
        exit(1);
    }
    if (control)
        control_serve(&machine);
    session_serve(&machine.wire, machine.shared, 1);
}

static _Noreturn void run_guest(void)
{
    machine.overlay = boot();
    sigset_t blocked;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGCHLD);
    machine.children = signalfd(-1, &blocked, SFD_CLOEXEC | SFD_NONBLOCK);
    sigaddset(&blocked, SIGUSR1); /* for the workers, from their first moment on */
    sigprocmask(SIG_BLOCK, &blocked, NULL);
    machine.random = open("/dev/urandom", O_RDWR | O_CLOEXEC);
    machine.shared = share();
    if (!ports_find(machine.ports)) {
        say("the host offers no control port");
        reboot(RB_AUTOBOOT);
    }
    start_workers(&machine);
    const struct port *port = &machine.ports[0];
    int fd = port->listener >= 0 ? -1 : port_open(port);
    if (!wire_open(&machine.wire, fd, port->listener, port->listener < 0, -1))
        say("control port: %s", strerror(errno));
    control_serve(&machine);
}

int main(int argc, char **argv)
{
    signal(SIGPIPE, SIG_IGN);
    umask(0);
    if (argc == 3 && strcmp(argv[1], "--serve") == 0)
        serve_socket(atoi(argv[2]), false);
    if (argc == 3 && strcmp(argv[1], "--control") == 0)
        serve_socket(atoi(argv[2]), true);
    if (getpid() == 1)
        run_guest();
    fprintf(stderr, "usage: coppice-agent --serve FD | --control FD (else it is PID 1 of a guest)\n");
    return 2;
}
