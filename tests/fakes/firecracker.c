/* A strict double of Firecracker 1.10 to 1.16: its API over a unix socket, its states and its errors, without a
 * virtual machine.
 *
 * Every request is checked against `facts.h`, which is generated from facts of Firecracker's API
 * document. Guest RAM is mapped like Firecracker's, at RAM_ADDRESS. The fake guest reads and writes it
 * through /proc/PID/mem, and receives connections to vsock ports as descriptors, from the socket
 * GUEST_SOCKET in the working directory. The process's name shows whether the machine is paused, as in
 * fake_vmm.c.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "firecracker_json.h"

#define RAM_ADDRESS ((char *)0x200000000UL)
#define PAGE 4096
#define STAMPED (16 * PAGE) /* identifies the RAM of a vmstate */
#define GUEST_SOCKET "guest.sock"
#define CLIENTS 64
#define HELD 256

enum state { NOT_STARTED, RUNNING, PAUSED };
static enum state state;
/* The guest accepts vsock data: not after a resume without the event of a snapshot. */
static bool acknowledges = true;
static bool event_sent;
static bool configured, has_kernel;
static size_t ram_size;
static int api = -1, vsock = -1;
static FILE *messages, *metrics;
static int minor = 16; /* of its version, which FIRECRACKER_DOUBLE_VERSION may set */
static const char *version = "1.16.1";
static struct { int fd; char text[65536]; size_t size; bool is_vsock; int port; } clients[CLIENTS];
static int held[HELD], held_count; /* the guest's connections */

static void say(const char *level, const char *format, ...)
{
	va_list arguments;
	va_start(arguments, format);
	fprintf(messages, "2026-01-01T00:00:00.000000000 [anonymous-instance:main:%s] ", level);
	vfprintf(messages, format, arguments);
	fputc('\n', messages);
	fflush(messages);
	va_end(arguments);
}

static _Noreturn void fail(const char *what)
{
	say("ERROR", "%s: %s", what, fault[0] ? fault : strerror(errno));
	say("INFO", "Firecracker exiting with error. exit_code=1");
	if (metrics) {
		fprintf(metrics, "{\"seccomp\":{\"num_faults\":0},\"vcpu\":{\"failures\":1}}\n");
		fclose(metrics);
	}
	exit(1);
}

/* Check that a path has the form that Coppice must use: relative, valid in any working directory. */
static bool relative(const char *path)
{
	return path[0] != '/' || strcmp(path, "/dev/null") == 0 || refuse("the path %s is not relative", path);
}

/* ---- the machine ---- */

static void turn(enum state next)
{
	state = next;
	prctl(PR_SET_NAME, next == PAUSED ? "fake-paused" : "fake-running");
}

static int listen_at(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	snprintf(address.sun_path, sizeof address.sun_path, "%s", path);
	if (fd < 0 || bind(fd, (struct sockaddr *)&address, sizeof address) < 0 || listen(fd, 64) < 0) {
		refuse("%s: %s (os error %d)", path, strerror(errno), errno);
		return -1;
	}
	return fd;
}

static bool map_ram(int file)
{
	int flags = MAP_FIXED_NOREPLACE | MAP_PRIVATE | (file < 0 ? MAP_ANONYMOUS : 0);
	void *ram = mmap(RAM_ADDRESS, ram_size, PROT_READ | PROT_WRITE, flags, file, 0);
	if (ram == MAP_FAILED)
		return refuse("Cannot map the guest memory: %s", strerror(errno));
	volatile char touched = *(volatile char *)ram; /* a running guest touches some of its memory */
	(void)touched;
	return true;
}

#define VMSTATE "{\"size\":%zu,\"generation\":%llu,\"end\":%d}" /* the generation identifies the RAM */

static unsigned long long stamp(void)
{
	unsigned long long hash = 14695981039346656037u;
	for (size_t i = 0; i < STAMPED; i++)
		hash = (hash ^ (uint8_t)RAM_ADDRESS[i]) * 1099511628211u;
	return hash;
}

static void reset_connections(void)
{
	while (held_count > 0) {
		shutdown(held[--held_count], SHUT_RDWR);
		close(held[held_count]);
	}
	event_sent = true;
}

static bool snapshot(void)
{
	static const char zeros[PAGE];
	const char *kind = leaf("snapshot_type"), *path = leaf("snapshot_path"), *ram = leaf("mem_file_path");
	if (state != PAUSED)
		return refuse("The requested operation is not supported: save/restore unavailable while running");
	if (kind && strcmp(kind, "Diff") == 0)
		return refuse("Diff snapshots are not enabled on uVMs with dirty page tracking disabled");
	if (!relative(path) || !relative(ram))
		return false;
	reset_connections();
	char saved[128];
	int size = snprintf(saved, sizeof saved, VMSTATE, ram_size, stamp(), 7);
	int file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
	if (file < 0 || write(file, saved, size) != size)
		return refuse("Create snapshot error: Cannot write the snapshot backing file: %s (os error %d)", strerror(errno), errno);
	int failed = fsync(file);
	close(file);
	if (failed)
		return refuse("Create snapshot error: Cannot perform sync_all on the snapshot backing file: %s (os error %d)", strerror(errno), errno);
	file = open(ram, O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
	if (file < 0 || ftruncate(file, 0) || ftruncate(file, ram_size))
		return refuse("Create snapshot error: Cannot perform truncate on the memory backing file: %s (os error %d)", strerror(errno), errno);
	for (size_t i = 0; i < ram_size; i += PAGE)
		if (memcmp(RAM_ADDRESS + i, zeros, PAGE) != 0 && pwrite(file, RAM_ADDRESS + i, PAGE, i) != PAGE)
			return refuse("Create snapshot error: Cannot dump memory: %s (os error %d)", strerror(errno), errno);
	close(file);
	return true;
}

static bool load(void)
{
	const char *path = leaf("snapshot_path"), *ram = leaf("mem_backend.backend_path"), *resume = leaf("resume_vm");
	if (state != NOT_STARTED || configured)
		return refuse("Loading a microVM snapshot not allowed after configuring boot-specific resources.");
	for (int i = 0; i < leaf_count; i++)
		if (minor < 12 && strncmp(leaves[i].field, "network_overrides", 17) == 0)
			return refuse("unknown field `network_overrides`");
	if (!ram || leaf("mem_file_path"))
		return refuse("missing field: either `mem_backend` or `mem_file_path` is required");
	if (!relative(path) || !relative(ram))
		return false;
	char saved[128] = "";
	unsigned long long generation = 0;
	int end = 0, file = open(path, O_RDONLY | O_CLOEXEC);
	if (file < 0 || read(file, saved, sizeof saved - 1) < 0 || sscanf(saved, VMSTATE, &ram_size, &generation, &end) != 3 || end != 7)
		fail("Load snapshot error: Failed to restore from snapshot: Failed to deserialize");
	close(file);
	struct stat found;
	file = open(ram, O_RDONLY | O_CLOEXEC);
	if (file < 0 || fstat(file, &found) || (size_t)found.st_size != ram_size)
		fail("Load snapshot error: the memory file does not have the size of the guest's memory");
	if (!map_ram(file))
		fail("Load snapshot error");
	close(file);
	if (stamp() != generation)
		fail("cannot load the vmstate: it is of another instant than the memory");
	if ((vsock = listen_at("vsock.sock")) < 0)
		fail("Load snapshot error: vsock");
	event_sent = true; /* the captured memory contains it */
	turn(resume && strcmp(resume, "true") == 0 ? RUNNING : PAUSED);
	return true;
}

static bool change(void)
{
	if (state == NOT_STARTED)
		return refuse("The requested operation is not supported before starting the microVM.");
	bool resumed = strcmp(leaf("state"), "Resumed") == 0;
	if (resumed) {
		acknowledges = event_sent || minor < 16; /* see RESET_BEFORE_RESUME of the driver */
		event_sent = false;
	}
	turn(resumed ? RUNNING : PAUSED);
	return true;
}

/* Handle one request before the start: the configured files must exist. */
static bool configure(const char *path)
{
	if (state != NOT_STARTED)
		return refuse("The requested operation is not supported after starting the microVM.");
	configured |= strcmp(path, "/serial") != 0 && strcmp(path, "/metrics") != 0; /* a snapshot can still be loaded after these */
	if (strcmp(path, "/serial") == 0 && minor < 16)
		return refuse("unknown field `rate_limiter`, expected `serial_out_path`");
	if (strcmp(path, "/metrics") == 0 && (!relative(leaf("metrics_path")) || !(metrics = fopen(leaf("metrics_path"), "ae"))))
		return fault[0] ? false : refuse("Cannot initialize the metrics: %s", strerror(errno));
	for (int i = 0; i < leaf_count; i++) {
		const char *field = leaves[i].field, *given = leaves[i].value;
		bool is_file = strcmp(field, "kernel_image_path") == 0 || strcmp(field, "initrd_path") == 0 || strcmp(field, "path_on_host") == 0;
		if (is_file && (!relative(given) || access(given, R_OK) < 0))
			return fault[0] ? false : refuse("%s: %s", given, strerror(errno));
		bool is_id = strcmp(field, "drive_id") == 0 || strcmp(field, "iface_id") == 0;
		if (is_id && strcmp(given, strrchr(path, '/') + 1) != 0)
			return refuse("The id from the path [%s] does not match the id from the body [%s]!", path, given);
		has_kernel |= strcmp(field, "kernel_image_path") == 0;
		if (strcmp(field, "mem_size_mib") == 0)
			ram_size = strtoull(given, NULL, 10) << 20;
		if (strcmp(field, "uds_path") == 0 && (!relative(given) || (vsock = listen_at(given)) < 0))
			return false;
	}
	return true;
}

static bool start(void)
{
	if (strcmp(leaf("action_type"), "InstanceStart") != 0 || state != NOT_STARTED)
		return refuse("The requested operation is not supported after starting the microVM.");
	if (!has_kernel || !ram_size || vsock < 0)
		return refuse("Cannot start microvm without kernel configuration.");
	if (!map_ram(-1))
		return false;
	turn(RUNNING);
	return true;
}

/* ---- connections ---- */

static void answer(int fd, int status, const char *body)
{
	char text[1024];
	int size = *body ? snprintf(text, sizeof text, "HTTP/1.1 %d \r\nServer: Firecracker API\r\nConnection: keep-alive\r\nContent-Type: application/json\r\n"
	                            "Content-Length: %zu\r\n\r\n%s", status, strlen(body), body)
	                 : snprintf(text, sizeof text, "HTTP/1.1 %d \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n", status);
	if (write(fd, text, size) != size)
		say("WARN", "a client went away");
}

static void serve(int fd, char *text, const char *body)
{
	char method[8], path[80], reply[768];
	fault[0] = 0;
	if (sscanf(text, "%7s %79s HTTP/1.1", method, path) != 2) {
		answer(fd, 400, "{\"fault_message\":\"malformed\"}");
		return;
	}
	static const char drives[] = "/drives/", nics[] = "/network-interfaces/";
	const char *pattern = strncmp(path, drives, strlen(drives)) == 0 ? "/drives/{drive_id}"
	                      : strncmp(path, nics, strlen(nics)) == 0   ? "/network-interfaces/{iface_id}"
	                                                                 : path;
	snprintf(request, sizeof request, "%s %s", method, pattern);
	bool is_known = false;
	for (size_t i = 0; i < sizeof requests / sizeof *requests; i++)
		is_known |= strcmp(requests[i], request) == 0;
	bool done = is_known ? strcmp(method, "GET") == 0 || check_body(body) : refuse("Invalid request method and/or path: %s.", request);
	if (done && strcmp(path, "/") == 0) {
		static const char *const names[] = {"Not started", "Running", "Paused"};
		snprintf(reply, sizeof reply, "{\"id\":\"anonymous-instance\",\"state\":\"%s\",\"vmm_version\":\"%s\",\"app_name\":\"Firecracker\"}", names[state], version);
		answer(fd, 200, reply);
		return;
	}
	if (done && strcmp(path, "/vm") == 0)
		done = change();
	else if (done && strcmp(path, "/snapshot/create") == 0)
		done = snapshot();
	else if (done && strcmp(path, "/snapshot/load") == 0)
		done = load();
	else if (done && strcmp(path, "/actions") == 0)
		done = start();
	else if (done)
		done = configure(path);
	snprintf(reply, sizeof reply, "{\"fault_message\":\"%s\"}", fault);
	answer(fd, done ? 204 : 400, done ? "" : reply);
}

static void forget_closed(void)
{
	for (int i = held_count - 1; i >= 0; i--) {
		struct pollfd one = {.fd = held[i]};
		if (poll(&one, 1, 0) == 1) {
			close(held[i]);
			held[i] = held[--held_count];
		}
	}
}

static bool hand_over(int fd, int port)
{
	forget_closed();
	struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = GUEST_SOCKET};
	int guest = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (guest < 0 || held_count == HELD || connect(guest, (struct sockaddr *)&address, sizeof address) < 0) {
		close(guest);
		return false;
	}
	uint8_t number = (uint8_t)port;
	union { char space[CMSG_SPACE(sizeof fd)]; struct cmsghdr align; } control = {0};
	struct iovec data = {&number, 1};
	struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
	struct cmsghdr *header = CMSG_FIRSTHDR(&message);
	*header = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS, .cmsg_len = CMSG_LEN(sizeof fd)};
	memcpy(CMSG_DATA(header), &fd, sizeof fd);
	bool sent = write(fd, "OK 1073741824\n", 14) == 14 && sendmsg(guest, &message, 0) == 1;
	close(guest);
	if (sent)
		held[held_count++] = fd;
	return sent;
}

/* Serve a vsock client: its first line names a port, and later bytes go to the guest. Return false when
 * it is no longer a client. */
static bool serve_vsock(int i)
{
	char byte;
	if (!clients[i].port) {
		ssize_t n;
		while ((n = recv(clients[i].fd, &byte, 1, MSG_DONTWAIT)) == 1 && byte != '\n' && clients[i].size < 63)
			clients[i].text[clients[i].size++] = byte;
		if (n < 0 && errno == EAGAIN)
			return true;
		clients[i].text[clients[i].size] = 0;
		if (n != 1 || sscanf(clients[i].text, "CONNECT %d", &clients[i].port) != 1) {
			close(clients[i].fd);
			return false;
		}
	}
	if (state != RUNNING || !acknowledges)
		return true;
	if (!hand_over(clients[i].fd, clients[i].port - 1024))
		close(clients[i].fd);
	return false;
}

static bool serve_api(int i)
{
	size_t room = sizeof clients[i].text - 1 - clients[i].size;
	ssize_t n = recv(clients[i].fd, clients[i].text + clients[i].size, room, MSG_DONTWAIT);
	if (n < 0 && errno == EAGAIN)
		return true;
	if (n <= 0) {
		close(clients[i].fd);
		return false;
	}
	clients[i].size += n;
	clients[i].text[clients[i].size] = 0;
	char *end = strstr(clients[i].text, "\r\n\r\n"), *length = strcasestr(clients[i].text, "content-length:");
	size_t size = length && length < end ? strtoul(length + 15, NULL, 10) : 0;
	if (end && clients[i].size >= (size_t)(end + 4 - clients[i].text) + size) {
		serve(clients[i].fd, clients[i].text, end + 4);
		clients[i].size = 0;
	}
	return true;
}

static void admit(int listener, bool is_vsock)
{
	int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
	for (int i = 0; fd >= 0 && i < CLIENTS; i++) {
		if (clients[i].fd)
			continue;
		clients[i].fd = fd;
		clients[i].size = 0;
		clients[i].port = 0;
		clients[i].is_vsock = is_vsock;
		return;
	}
	close(fd);
}

int main(int argc, char **argv)
{
	const char *socket_path = NULL;
	messages = stdout;
	if (getenv("FIRECRACKER_DOUBLE_VERSION"))
		version = getenv("FIRECRACKER_DOUBLE_VERSION");
	if (sscanf(version, "1.%d.", &minor) != 1)
		return 2;
	for (int i = 1; i < argc; i++) {
		if (strcmp(argv[i], "--version") == 0)
			return printf("Firecracker v%s\n", version) < 0;
		if (strcmp(argv[i], "--show-level") == 0)
			continue;
		const char *word = i + 1 < argc ? argv[++i] : "";
		if (strcmp(argv[i - 1], "--api-sock") == 0)
			socket_path = word;
		else if (strcmp(argv[i - 1], "--log-path") == 0)
			messages = fopen(word, "ae");
		else if (strcmp(argv[i - 1], "--level") != 0)
			return fprintf(stderr, "Arguments parsing error: %s\n", argv[i - 1]), 153;
	}
	signal(SIGPIPE, SIG_IGN);
	if (!messages || !socket_path || socket_path[0] == '/')
		return 1;
	say("INFO", "Running Firecracker v%s", version);
	if ((api = listen_at(socket_path)) < 0)
		fail("Failed to bind the API socket");
	say("INFO", "Listening on API socket (\"%s\").", socket_path);
	for (;;) {
		struct pollfd wanted[CLIENTS + 2] = {{.fd = api, .events = POLLIN}, {.fd = vsock, .events = POLLIN}};
		for (int i = 0; i < CLIENTS; i++) {
			bool waits = clients[i].is_vsock && clients[i].port;
			wanted[i + 2] = (struct pollfd){.fd = clients[i].fd && !waits ? clients[i].fd : -1, .events = POLLIN};
		}
		if (poll(wanted, CLIENTS + 2, -1) < 0 && errno != EINTR)
			fail("poll");
		for (int i = 0; i < CLIENTS; i++) {
			bool waits = clients[i].is_vsock && clients[i].port;
			if (clients[i].fd && (wanted[i + 2].revents || waits) && !(clients[i].is_vsock ? serve_vsock(i) : serve_api(i)))
				clients[i].fd = 0;
		}
		if (wanted[0].revents)
			admit(api, false);
		if (wanted[1].revents)
			admit(vsock, true);
	}
}
