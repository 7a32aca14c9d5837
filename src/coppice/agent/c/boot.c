/* From the initramfs to the image's root: mounts, modules, the overlay, and the switch. */
#define _GNU_SOURCE
#include "boot.h"
#include "random.h"
#include "self.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#define DISK_WAIT_MS 10000

/* End the VMM, since there is no machine without a root. The console has the reason. */
static _Noreturn void give_up(const char *what)
{
    say("%s: %s", what, strerror(errno));
    sync();
    reboot(RB_AUTOBOOT);
    for (;;)
        pause();
}

/* Make a missing mount point, as container runtimes do. It replaces a dangling link. */
static void make_mount_point(const char *path, mode_t mode)
{
    if (mkdir(path, mode) < 0 && errno == EEXIST && access(path, F_OK) < 0 && unlink(path) == 0)
        mkdir(path, mode);
}

static void mount_at(const char *source, const char *path, const char *type, unsigned long flags, const char *options)
{
    make_mount_point(path, 0755);
    if (mount(source, path, type, flags, options) < 0 && errno != EBUSY)
        say("mount %s: %s", path, strerror(errno));
}

static void use_console(void)
{
    if (fcntl(STDERR_FILENO, F_GETFD) >= 0)
        return;
    int fd = open("/dev/console", O_RDWR | O_NOCTTY);
    if (fd < 0)
        fd = open("/dev/null", O_RDWR);
    for (int i = 0; i < 3; i++) {
        if (fd != i)
            dup2(fd, i);
    }
    if (fd > 2)
        close(fd);
}

static void mount_kernel_filesystems(void)
{
    mount_at("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount_at("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount_at("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755");
    use_console();
}

/* ---- disks ---- */

struct disks {
    const char *root, *root_type, *overlay;
};

/* Tell the machine's own two disks apart by their contents: the VMM decides the order of the names. */
static const char *file_system_on(const char *device)
{
    uint8_t head[2048];
    int fd = open(device, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return NULL;
    ssize_t size = pread(fd, head, sizeof head, 0);
    close(fd);
    if (size < (ssize_t)sizeof head)
        return NULL;
    if (load_u32(head + 1024) == 0xE0F5E1E2)
        return "erofs";
    return head[1024 + 56] == 0x53 && head[1024 + 57] == 0xEF ? "ext4" : NULL;
}

static bool find_disks(struct disks *d)
{
    static char root[] = "/dev/vdX", overlay[] = "/dev/vdX";
    *d = (struct disks){0};
    for (char letter = 'a'; letter <= 'z'; letter++) {
        char name[] = "/dev/vdX";
        name[sizeof name - 2] = letter;
        if (access(name, F_OK) < 0 || is_volume(letter)) /* a volume may have any contents */
            continue;
        const char *type = file_system_on(name);
        if (type && strcmp(type, "ext4") == 0) {
            d->overlay = strcpy(overlay, name);
        } else if (type) {
            d->root = strcpy(root, name);
            d->root_type = type;
        }
    }
    return d->root && d->overlay;
}

static struct disks wait_for_disks(void)
{
    struct disks d;
    for (int64_t end = now_ms() + DISK_WAIT_MS; !find_disks(&d); pause_ms(5)) {
        if (now_ms() >= end) {
            errno = ENODEV;
            give_up(d.root ? "there is no ext4 disk for the overlay" : "there is no disk with an erofs root");
        }
    }
    return d;
}

static int mount_root(void)
{
    struct disks d = wait_for_disks();
    mkdir("/lower", 0755);
    mkdir("/overlay", 0755);
    mkdir("/newroot", 0755);
    if (mount(d.root, "/lower", d.root_type, MS_RDONLY, NULL) < 0)
        give_up("mount the root");
    /* Without these options the kernel initialises and prefetches tables in the background, again
     * in each fork. */
    if (mount(d.overlay, "/overlay", "ext4", MS_NOATIME, "noinit_itable,no_prefetch_block_bitmaps") < 0)
        give_up("mount the overlay's disk");
    mkdir("/overlay/upper", 0755);
    mkdir("/overlay/work", 0755);
    if (mount("overlay", "/newroot", "overlay", MS_NOATIME, "lowerdir=/lower,upperdir=/overlay/upper,workdir=/overlay/work") < 0)
        give_up("mount the overlay");
    int fd = open("/overlay", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0)
        give_up("/overlay");
    return fd;
}

/* ---- the switch ---- */

/* Remove the files of the initramfs, which take up memory, before the new root hides them. */
static void free_initramfs(void)
{
    DIR *modules = opendir("/modules");
    struct dirent *entry;
    while (modules && (entry = readdir(modules)) != NULL)
        unlinkat(dirfd(modules), entry->d_name, 0);
    if (modules)
        closedir(modules);
    unlink("/init");
}

static void switch_root(void)
{
    static const char *const moved[] = {"dev", "proc", "sys"};
    free_initramfs();
    if (chdir("/newroot") < 0)
        give_up("/newroot");
    for (int i = 0; i < 3; i++) {
        char from[8] = "/";
        make_mount_point(moved[i], 0755);
        if (mount(strcat(from, moved[i]), moved[i], NULL, MS_MOVE, NULL) < 0)
            give_up(moved[i]);
    }
    if (mount(".", "/", NULL, MS_MOVE, NULL) < 0 || chroot(".") < 0 || chdir("/") < 0)
        give_up("switch to the root");
}

static void furnish(void)
{
    mount_at("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=666");
    mount_at("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777");
    mount_at("mqueue", "/dev/mqueue", "mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mount_at("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755");
    mount_at("cgroup2", "/sys/fs/cgroup", "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL);
    mkdir("/run/lock", 01777);
    mkdir("/run/coppice", 0755);
    mkdir("/etc", 0755);
    make_mount_point("/tmp", 01777);
    if (symlink("/proc/self/mounts", "/etc/mtab") < 0 && errno != EEXIST)
        say("/etc/mtab: %s", strerror(errno));
    static const char *const links[][2] = {
        {"/proc/self/fd", "/dev/fd"}, {"/proc/self/fd/0", "/dev/stdin"}, {"/proc/self/fd/1", "/dev/stdout"}, {"/proc/self/fd/2", "/dev/stderr"},
    };
    for (size_t i = 0; i < sizeof links / sizeof *links; i++) {
        if (symlink(links[i][0], links[i][1]) < 0 && errno != EEXIST)
            say("%s: %s", links[i][1], strerror(errno));
    }
    chmod("/dev/ptmx", 0666);
    struct rlimit files = {.rlim_cur = 1024, .rlim_max = 524288}; /* as init systems set it */
    setrlimit(RLIMIT_NOFILE, &files);
    link_up_loopback();
    mount_own_files();
}

int boot(void)
{
    mount_kernel_filesystems();
    /* The host tells the IPv6 address, if there is one (network6.c): one that the kernel makes from the first MAC would be the same in every
     * fork. The cards that the modules bring take this over. */
    sys_write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1");
    load_modules("/modules");
    int overlay = mount_root();
    int guest_files = open("/guest", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    switch_root();
    furnish();
    place_guest_files(guest_files);
    refuse_wiped_pages();
    return overlay;
}
