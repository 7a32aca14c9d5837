/* The launcher: it starts one program with few rights, as a child of the process that started the launcher. */
#pragma once

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define MOST 256

struct plan {
	int report;                  /* a pipe: what has become of the program */
	int cgroup;                  /* the directory of a control group, or -1 */
	int netns;                   /* a network namespace, or -1 */
	const char *kept[MOST];      /* descriptors that the program inherits */
	int kept_count;
	int first_listening;         /* the descriptor of the first of them, above all others */
	const char *listening[MOST]; /* names of sockets in the working directory */
	int listening_count;
	bool own_userns;             /* in a user namespace of its own, as its root */
	bool restricted;             /* it gains no rights by starting another program */
	bool keeps_capabilities;     /* false: it has at most those of `capabilities` */
	uint64_t capabilities;
	int64_t user;                /* -1: the caller's */
	gid_t groups[MOST];          /* besides the group with the number of the user */
	int group_count;
	uint64_t largest_file;       /* 0: the caller's limit */
	uint64_t most_files;         /* 0: the caller's limit */
	const char *readable[MOST];  /* paths; if there are any here or below, all others are closed to the program */
	int readable_count;
	const char *writable[MOST];
	int writable_count;
	char **program;              /* its path and arguments, NULL at the end */
};

/* restrict.c: each ends the process with a report if the kernel refuses. */
void restrict_process(const struct plan *plan);

/* landlock.c: version 0 and no rules (-1) if this kernel has no Landlock. */
int landlock_version(void);
int landlock_rules(const struct plan *plan);
void landlock_apply(int rules);

/* launcher.c: report what failed, with errno, and end this process. */
_Noreturn void fail(const char *step);
