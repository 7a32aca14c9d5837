/* The rights of the process that becomes the program. The order matters: what needs rights comes before they are given up. */
#define _GNU_SOURCE
#include "launcher.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/capability.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#define EMPTY_PATH 0x1000 /* AT_EMPTY_PATH */
#define LAST_CAPABILITY 63

extern char **environ;

static void limit(int resource, uint64_t most, const char *step)
{
	struct rlimit now;
	if (getrlimit(resource, &now) < 0)
		fail(step);
	if (now.rlim_max != RLIM_INFINITY && most > now.rlim_max)
		most = now.rlim_max; /* nobody may raise it without CAP_SYS_RESOURCE */
	struct rlimit wanted = {most, most};
	if (setrlimit(resource, &wanted) < 0)
		fail(step);
}

static void put(const char *path, const char *text)
{
	int file = open(path, O_WRONLY | O_CLOEXEC);
	if (file < 0 || write(file, text, strlen(text)) != (ssize_t)strlen(text))
		fail("map this user into a user namespace");
	close(file);
}

/* Root of a user namespace is root with respect to this user's files alone. */
static void enter_own_userns(void)
{
	char users[40], groups[40];
	snprintf(users, sizeof users, "0 %u 1\n", geteuid());
	snprintf(groups, sizeof groups, "0 %u 1\n", getegid());
	if (unshare(CLONE_NEWUSER) < 0)
		fail("make a user namespace");
	put("/proc/self/uid_map", users);
	put("/proc/self/setgroups", "deny");
	put("/proc/self/gid_map", groups);
}

static void bound_capabilities(uint64_t kept)
{
	for (int number = 0; number <= LAST_CAPABILITY; number++) {
		if (kept >> number & 1)
			continue;
		int held = prctl(PR_CAPBSET_READ, number, 0, 0, 0);
		if (held < 0)
			break; /* the kernel has no more */
		if (held && prctl(PR_CAPBSET_DROP, number, 0, 0, 0) < 0)
			fail("give up capabilities");
	}
	prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0);
}

static void become_user(const struct plan *plan)
{
	gid_t group = (gid_t)plan->user;
	uid_t user = (uid_t)plan->user;
	if (setgroups(plan->group_count, plan->groups) < 0 || setresgid(group, group, group) < 0 || setresuid(user, user, user) < 0)
		fail("change the user");
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct none[2] = {0};
	if (syscall(SYS_capset, &header, none) < 0)
		fail("give up capabilities");
}

void restrict_process(const struct plan *plan)
{
	setsid(); /* no signal of a terminal reaches it */
	/* Opened with the caller's rights: the new user may not reach its directory. */
	int program = plan->user < 0 ? -1 : open(plan->program[0], O_PATH | O_CLOEXEC);
	if (plan->user >= 0 && program < 0)
		fail("execute");
	for (int i = 0; i < plan->kept_count; i++)
		if (fcntl(atoi(plan->kept[i]), F_SETFD, 0) < 0)
			fail("keep a descriptor");
	if (plan->own_userns)
		enter_own_userns();
	if (plan->netns >= 0 && setns(plan->netns, CLONE_NEWNET) < 0)
		fail("enter the network namespace");
	if (plan->restricted)
		limit(RLIMIT_CORE, 0, "limit core files"); /* they would have the guest's memory */
	if (plan->largest_file)
		limit(RLIMIT_FSIZE, plan->largest_file, "limit the size of files");
	if (plan->most_files)
		limit(RLIMIT_NOFILE, plan->most_files, "limit open files");
	int rules = plan->readable_count + plan->writable_count ? landlock_rules(plan) : -1;
	if (plan->restricted && prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		fail("give up new privileges");
	if (!plan->keeps_capabilities)
		bound_capabilities(plan->capabilities);
	if (plan->user >= 0)
		become_user(plan);
	if (rules >= 0)
		landlock_apply(rules);
	if (program >= 0)
		syscall(SYS_execveat, program, "", plan->program, environ, EMPTY_PATH);
	else
		execv(plan->program[0], plan->program);
	fail("execute");
}
