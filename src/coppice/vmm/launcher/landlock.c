/* Landlock: files that no rule names are closed to the program. See the kernel's userspace-api/landlock. */
#define _GNU_SOURCE
#include "launcher.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_landlock_create_ruleset
#define SYS_landlock_create_ruleset 444
#define SYS_landlock_add_rule 445
#define SYS_landlock_restrict_self 446
#endif

/* linux/landlock.h, which older headers lack. */
enum { EXECUTE = 1 << 0, WRITE_FILE = 1 << 1, READ_FILE = 1 << 2, READ_DIR = 1 << 3, MAKE_CHAR = 1 << 6, MAKE_BLOCK = 1 << 11,
       TRUNCATE = 1 << 14, IOCTL_DEV = 1 << 15 };
#define OF_FILES (EXECUTE | WRITE_FILE | READ_FILE | TRUNCATE | IOCTL_DEV)
#define ASK_VERSION 1
#define PATH_BENEATH 1

static uint64_t handled; /* the accesses that this kernel can restrict */

static void allow(int rules, const char *path, uint64_t access)
{
	struct { uint64_t access; int32_t parent; } __attribute__((packed)) rule = {.parent = open(path, O_PATH | O_CLOEXEC)};
	struct stat found;
	if (rule.parent < 0 && (errno == ENOENT || errno == EACCES || errno == ENOTDIR))
		return; /* what is not there needs no rule */
	if (rule.parent < 0 || fstat(rule.parent, &found) < 0)
		fail("open a path that the program may use");
	rule.access = access & handled & (S_ISDIR(found.st_mode) ? ~0ULL : OF_FILES);
	if (syscall(SYS_landlock_add_rule, rules, PATH_BENEATH, &rule, 0) < 0)
		fail("allow a path by Landlock");
	close(rule.parent);
}

int landlock_version(void)
{
	long version = syscall(SYS_landlock_create_ruleset, NULL, 0, ASK_VERSION);
	return version < 0 ? 0 : (int)version;
}

int landlock_rules(const struct plan *plan)
{
	int version = landlock_version();
	if (!version)
		return -1;
	handled = (1 << 13) - 1;
	if (version >= 2)
		handled |= 1 << 13; /* links and renames between directories */
	if (version >= 3)
		handled |= TRUNCATE;
	if (version >= 5)
		handled |= IOCTL_DEV;
	/* From version 6 on: abstract unix sockets of others, and signals to others. */
	struct { uint64_t files, ports, scopes; } set = {.files = handled, .scopes = version >= 6 ? 3 : 0};
	int rules = (int)syscall(SYS_landlock_create_ruleset, &set, version >= 6 ? 24 : version >= 4 ? 16 : 8, 0);
	if (rules < 0)
		fail("make Landlock rules");
	for (int i = 0; i < plan->readable_count; i++)
		allow(rules, plan->readable[i], EXECUTE | READ_FILE | READ_DIR);
	for (int i = 0; i < plan->writable_count; i++)
		allow(rules, plan->writable[i], ~(uint64_t)(EXECUTE | MAKE_CHAR | MAKE_BLOCK));
	return rules;
}

void landlock_apply(int rules)
{
	if (syscall(SYS_landlock_restrict_self, rules, 0) < 0)
		fail("apply Landlock rules");
	close(rules);
}
