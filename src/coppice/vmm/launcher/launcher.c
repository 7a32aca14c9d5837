/* Start one program with few rights, and report its process id. Used by Coppice alone: see starting.py.
 *
 * usage: coppice-launcher report=FD WORD... -- PROGRAM ARGUMENT...
 *        coppice-launcher landlock    print the version of this kernel's Landlock
 *
 * The program becomes a child of the caller (CLONE_PARENT), in its control group from the first instruction on
 * (CLONE_INTO_CGROUP). Only the child is restricted. The launcher resumes when the child has executed its program
 * or has ended (CLONE_VFORK), so the report is true: "started PID", or "failed ERRNO STEP" and then "started PID".
 */
#define _GNU_SOURCE
#include "launcher.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define INTO_CGROUP 0x200000000ULL /* CLONE_INTO_CGROUP of linux/sched.h, from 5.7 on */

static int report = -1;

static void tell(const char *text, size_t size)
{
	if (write(report, text, size) != (ssize_t)size)
		_exit(126); /* nobody listens any more */
}

_Noreturn void fail(const char *step)
{
	char text[160];
	int size = snprintf(text, sizeof text, "failed %d %.100s\n", errno, step);
	tell(text, size);
	_exit(127);
}

static _Noreturn void usage(const char *word)
{
	fprintf(stderr, "coppice-launcher: wrong argument: %s\n", word);
	_exit(2);
}

static uint64_t number(const char *word, const char *value, int base)
{
	char *end;
	errno = 0;
	uint64_t found = strtoull(value, &end, base);
	if (errno || !*value || *end)
		usage(word);
	return found;
}

static int descriptor(const char *word, const char *value)
{
	int fd = (int)number(word, value, 10);
	if (fcntl(fd, F_SETFD, FD_CLOEXEC) < 0)
		usage(word);
	return fd;
}

static void add(const char **list, int *count, const char *word, const char *value)
{
	if (*count == MOST)
		usage(word);
	list[(*count)++] = value;
}

static void take(struct plan *plan, const char *word)
{
	const char *value = strchr(word, '=');
	size_t length = value ? (size_t)(value++ - word) : strlen(word);
	if (!value)
		value = "";
#define IS(key) (length == strlen(key) && memcmp(word, key, length) == 0)
	if (IS("report"))
		report = plan->report = descriptor(word, value);
	else if (IS("cgroup"))
		plan->cgroup = descriptor(word, value);
	else if (IS("netns"))
		plan->netns = descriptor(word, value);
	else if (IS("listen-from"))
		plan->first_listening = (int)number(word, value, 10);
	else if (IS("listen"))
		add(plan->listening, &plan->listening_count, word, value);
	else if (IS("keep"))
		add(plan->kept, &plan->kept_count, word, value);
	else if (IS("userns"))
		plan->own_userns = true;
	else if (IS("restricted"))
		plan->restricted = true;
	else if (IS("capabilities")) {
		plan->keeps_capabilities = false;
		plan->capabilities = number(word, value, 16);
	} else if (IS("user"))
		plan->user = (int64_t)number(word, value, 10);
	else if (IS("group")) {
		if (plan->group_count == MOST)
			usage(word);
		plan->groups[plan->group_count++] = (gid_t)number(word, value, 10);
	} else if (IS("file-size"))
		plan->largest_file = number(word, value, 10);
	else if (IS("files"))
		plan->most_files = number(word, value, 10);
	else if (IS("read"))
		add(plan->readable, &plan->readable_count, word, value);
	else if (IS("write"))
		add(plan->writable, &plan->writable_count, word, value);
	else
		usage(word);
}

/* Replaces a stale socket. */
static void listen_on(const char *name, int number)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int made = socket(AF_UNIX, SOCK_STREAM, 0);
	if (made < 0 || strlen(name) >= sizeof address.sun_path)
		fail("make a socket");
	strcpy(address.sun_path, name);
	unlink(name);
	if (bind(made, (struct sockaddr *)&address, sizeof address) < 0 || listen(made, 1) < 0 || dup2(made, number) < 0)
		fail("listen on a socket");
	if (made != number)
		close(made);
}

/* A child of this process's parent. Without a control group by the older call, which more containers permit. */
static pid_t start(int cgroup)
{
	if (cgroup < 0)
		return (pid_t)syscall(SYS_clone, (unsigned long)(CLONE_VFORK | CLONE_PARENT), NULL, NULL, NULL, 0UL);
	struct { /* struct clone_args of linux/sched.h, from 5.7 on */
		uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
	} args = {.flags = CLONE_VFORK | CLONE_PARENT | INTO_CGROUP, .cgroup = (uint64_t)cgroup};
	return (pid_t)syscall(SYS_clone3, &args, sizeof args);
}

int main(int argc, char **argv)
{
	struct plan plan = {.report = -1, .cgroup = -1, .netns = -1, .user = -1, .keeps_capabilities = true};
	if (argc == 2 && strcmp(argv[1], "landlock") == 0)
		return printf("%d\n", landlock_version()) < 0;
	int at = 1;
	for (; at < argc && strcmp(argv[at], "--") != 0; at++)
		take(&plan, argv[at]);
	if (report < 0 || at + 1 >= argc)
		usage("no report or no program");
	plan.program = argv + at + 1;

	for (int i = 0; i < plan.listening_count; i++)
		listen_on(plan.listening[i], plan.first_listening + i);

	sigset_t none;
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
	signal(SIGXFSZ, SIG_IGN); /* a write beyond the limit of file sizes fails, and ends nothing */
	pid_t child = start(plan.cgroup);
	if (child < 0)
		fail(plan.cgroup < 0 ? "make a process" : "make a process in its control group");
	if (child == 0)
		restrict_process(&plan); /* does not return: it executes the program */
	char text[32];
	tell(text, (size_t)snprintf(text, sizeof text, "started %d\n", child));
	return 0;
}
