/* Authorities that this machine's programs trust besides those of the image. */
#define _GNU_SOURCE
#include "self.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char bundle[] = "/etc/ssl/certs/ca-certificates.crt"; /* BUNDLE of the host */
static const char of_red_hat[] = "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem";

static int append(const char *path, const char *pem)
{
    size_t size = 0;
    char *now = load_file(path, &size);
    if (!now)
        return errno;
    bool there = memmem(now, size, pem, strlen(pem));
    const char *gap = size && now[size - 1] != '\n' ? "\n" : "";
    free(now);
    if (there)
        return 0;
    int fd = open(path, O_WRONLY | O_APPEND | O_CLOEXEC);
    if (fd < 0)
        return errno;
    int error = write_all(fd, gap, strlen(gap)) && write_all(fd, pem, strlen(pem)) ? 0 : errno;
    close(fd);
    return error;
}

/* Make the bundle if the image has none, with the certificates that it has elsewhere. */
static int make_bundle(void)
{
    size_t size = 0;
    int error = make_directories("/etc/ssl/certs");
    if (error || access(bundle, F_OK) == 0)
        return error;
    char *elsewhere = load_file(of_red_hat, &size);
    error = put_file(bundle, elsewhere ? elsewhere : "", size, 0644);
    free(elsewhere);
    return error;
}

int trust_certificate(const char *pem, size_t number)
{
    /* update-ca-certificates makes the bundle again from the files of this directory. */
    static const char sources[] = "/usr/local/share/ca-certificates";
    char path[80];
    snprintf(path, sizeof path, "%s/coppice-%zu.crt", sources, number);
    int error = make_directories(sources);
    if (!error)
        error = put_file(path, pem, strlen(pem), 0644);
    if (!error)
        error = make_bundle();
    if (!error)
        error = append(bundle, pem);
    if (!error && access(of_red_hat, F_OK) == 0)
        error = append(of_red_hat, pem);
    return error;
}
