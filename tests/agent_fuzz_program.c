/* The programs of the agent's fuzz: one static file, by the name under which it is started. It can do
 * no harm whatever its arguments are. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(int argc, char **argv)
{
    const char *slash = strrchr(argv[0], '/'), *name = slash ? slash + 1 : argv[0];
    char data[4096];
    ssize_t n;
    if (strcmp(name, "cat") == 0) {
        while ((n = read(0, data, sizeof data)) > 0 && write(1, data, (size_t)n) == n) {
        }
    } else if (strcmp(name, "yes") == 0) {
        memset(data, 'y', sizeof data);
        while (write(1, data, sizeof data) > 0) {
        }
    } else if (strcmp(name, "sleep") == 0) {
        pause();
    } else if (strcmp(name, "sh") == 0) {
        if (write(1, "out\n", 4) != 4 || write(2, "err\n", 4) != 4)
            return 1;
        if (fork() == 0) { /* a child in a session of its own */
            setsid();
            pause();
        }
        return 3;
    } else {
        for (int i = 1; i < argc; i++)
            printf("%s%c", argv[i], i + 1 < argc ? ' ' : '\n');
    }
    return 0;
}
