/* A VMM without a machine: it maps guest RAM like a real one, reports that it is ready, and waits to
 * be killed.
 *
 *   fake-vmm shared|private|anonymous|copied FILE SIZE READY_FD SAVE_FILE
 *
 * `anonymous` copies the file's data into its own memory, like the first boot of a VMM whose RAM is in
 * no file. `copied` copies the holes too, like a driver that silently shares nothing. The mapping is at
 * RAM_ADDRESS, so that the fake guest can read and write it through /proc/PID/mem, as a vCPU would.
 *
 * SIGUSR1 pauses the machine, SIGUSR2 resumes it, and SIGHUP makes the VMM write its RAM to SAVE_FILE. The process's name is
 * the result of the latest signal. A signal is never handled during another one, so the VMM has finished all orders when no
 * signal is pending, it sleeps, and it is not called fake-saving. The sender of an earlier order may have been killed.
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

#define RAM_ADDRESS ((char *)0x200000000UL)
#define PAGE 4096

static size_t size;
static const char *save_file;

static void turn(int number)
{
	prctl(PR_SET_NAME, number == SIGUSR1 ? "fake-paused" : "fake-running");
}

/* Write all RAM to a sparse file, with only functions that a signal handler may call. */
static int write_ram(void)
{
	static const char zeros[PAGE];
	int file = open(save_file, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW, 0600);
	if (file < 0)
		return -1;
	int failed = ftruncate(file, size);
	for (size_t at = 0; at < size && !failed; at += PAGE)
		if (memcmp(RAM_ADDRESS + at, zeros, PAGE) != 0)
			failed = pwrite(file, RAM_ADDRESS + at, PAGE, at) != PAGE;
	return close(file) || failed ? -1 : 0;
}

static void save(int number)
{
	(void)number;
	prctl(PR_SET_NAME, "fake-saving");
	prctl(PR_SET_NAME, write_ram() ? "fake-unsaved" : "fake-saved");
}

static void handle(int number, void (*handler)(int))
{
	struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
	sigfillset(&action.sa_mask);
	sigaction(number, &action, NULL);
}

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

/* Read the file's data into RAM; read its holes too only if `holes_too`. */
static void fill(int file, int holes_too)
{
	if (holes_too && pread(file, RAM_ADDRESS, size, 0) != (ssize_t)size)
		fail("fake-vmm: cannot read the memory");
	off_t at = 0;
	while ((at = lseek(file, at, SEEK_DATA)) >= 0) {
		off_t end = lseek(file, at, SEEK_HOLE);
		if (pread(file, RAM_ADDRESS + at, end - at, at) != end - at)
			fail("fake-vmm: cannot read the memory");
		at = end;
	}
}

int main(int argc, char **argv)
{
	if (argc != 6) {
		fputs("fake-vmm: usage: fake-vmm KIND FILE SIZE READY_FD SAVE_FILE\n", stderr);
		return 2;
	}
	int shared = strcmp(argv[1], "shared") == 0, copied = strcmp(argv[1], "copied") == 0;
	int anonymous = copied || strcmp(argv[1], "anonymous") == 0;
	save_file = argv[5];
	handle(SIGUSR1, turn);
	handle(SIGUSR2, turn);
	handle(SIGHUP, save);
	size = strtoull(argv[3], NULL, 10);
	int ready = atoi(argv[4]);
	int file = open(argv[2], shared ? O_RDWR : O_RDONLY);
	if (file < 0)
		fail("fake-vmm: cannot open the memory");
	int flags = MAP_FIXED_NOREPLACE | (shared ? MAP_SHARED : MAP_PRIVATE) | (anonymous ? MAP_ANONYMOUS : 0);
	void *ram = mmap(RAM_ADDRESS, size, PROT_READ | PROT_WRITE, flags, anonymous ? -1 : file, 0);
	if (ram == MAP_FAILED)
		fail("fake-vmm: cannot map the memory");
	if (anonymous)
		fill(file, copied);
	/* The file stays open, as in a real VMM, because a tracer may map it again. A running guest touches
	 * some of its memory: these pages are shared with the file until they are written. */
	volatile char touched = *(volatile char *)ram;
	(void)touched;
	if (write(ready, "", 1) != 1)
		fail("fake-vmm: the reader has closed its end");
	close(ready);
	for (;;)
		pause();
}
