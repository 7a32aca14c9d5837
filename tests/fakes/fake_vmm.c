/* A VMM without a machine: it maps guest RAM as a real one does, says that it is there, and waits to be killed.
 *
 *   fake-vmm shared|private|anonymous FILE SIZE READY_FD
 *
 * `anonymous` copies the file into memory of its own: a driver that shares nothing and says nothing of it. The mapping is at
 * RAM_ADDRESS, so that whoever plays the guest can read and write it through /proc/PID/mem, as a vCPU would. SIGUSR1 pauses the
 * machine and SIGUSR2 lets it run: the process's own name says which, to everyone.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#define RAM_ADDRESS ((void *)0x200000000UL)

static void turn(int number)
{
	prctl(PR_SET_NAME, number == SIGUSR1 ? "fake-paused" : "fake-running");
}

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

int main(int argc, char **argv)
{
	if (argc != 5) {
		fputs("fake-vmm: usage: fake-vmm KIND FILE SIZE READY_FD\n", stderr);
		return 2;
	}
	int shared = strcmp(argv[1], "shared") == 0, anonymous = strcmp(argv[1], "anonymous") == 0;
	signal(SIGUSR1, turn);
	signal(SIGUSR2, turn);
	size_t size = strtoull(argv[3], NULL, 10);
	int ready = atoi(argv[4]);
	int file = open(argv[2], shared ? O_RDWR : O_RDONLY);
	if (file < 0)
		fail("fake-vmm: cannot open the memory");
	int flags = MAP_FIXED_NOREPLACE | (shared ? MAP_SHARED : MAP_PRIVATE) | (anonymous ? MAP_ANONYMOUS : 0);
	void *ram = mmap(RAM_ADDRESS, size, PROT_READ | PROT_WRITE, flags, anonymous ? -1 : file, 0);
	if (ram == MAP_FAILED)
		fail("fake-vmm: cannot map the memory");
	if (anonymous && pread(file, ram, size, 0) != (ssize_t)size)
		fail("fake-vmm: cannot read the memory");
	/* The file stays open, as a VMM's does: its memory may be made to map the file anew. A guest touches some of its memory
	 * when it runs: these pages are shared with the file until they are written. */
	volatile char touched = *(volatile char *)ram;
	(void)touched;
	if (write(ready, "", 1) != 1)
		fail("fake-vmm: nobody waits");
	close(ready);
	for (;;)
		pause();
}
