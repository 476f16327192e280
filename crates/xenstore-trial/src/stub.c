/*
 * A Xen that consists of files, for a stock xenstored that was started with this library in front of its own
 * (LD_PRELOAD). The folder FAKE_XEN holds:
 *
 *   domain-N   exists while domain N does; its first letter: r running, s shut down, d dying
 *   ring-N     the page that domain N shares with the daemon (ring-0: dom0's, instead of /proc/xen/xsd_kva)
 *   port       dom0's port, as text (instead of /proc/xen/xsd_port)
 *   to-daemon  a FIFO: each 32-bit word is a local port that was raised for the daemon
 *   from-daemon  a FIFO: each 32-bit word is a local port that the daemon notified
 *
 * oxenstored has its paths built in and wants a limit that only root may set: where FAKE_SOCKET is set, it binds that instead, and
 * makes no folder, removes no file and sets no limit.
 *
 * Local ports: 1 for VIRQ_DOM_EXC, 16 + N for domain N. Only what the xenstoreds of 4.17 call is here. The real libraries
 * are loaded too, so everything that is not answered here fails as it does without Xen.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define VIRQ_PORT 1
#define PORT_BASE 16

static int handle; /* what the open functions point at; it is never looked into */
static int events = -1;

static int open_in(const char *name, unsigned int number, int flags)
{
    char path[4096];
    const char *dir = getenv("FAKE_XEN");

    if (!dir) {
        errno = ENOENT;
        return -1;
    }
    if (number == ~0u)
        snprintf(path, sizeof(path), "%s/%s", dir, name);
    else
        snprintf(path, sizeof(path), "%s/%s-%u", dir, name, number);
    return openat(AT_FDCWD, path, flags);
}

int open(const char *path, int flags, ...)
{
    va_list ap;
    mode_t mode;

    va_start(ap, flags);
    mode = (flags & O_CREAT) ? va_arg(ap, mode_t) : 0;
    va_end(ap);
    if (!strcmp(path, "/proc/xen/xsd_kva"))
        return open_in("ring", 0, flags);
    if (!strcmp(path, "/proc/xen/xsd_port"))
        return open_in("port", ~0u, flags);
    return openat(AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...) __attribute__((alias("open")));

void *xc_interface_open(void *logger, void *dombuild_logger, unsigned int flags)
{
    return &handle;
}

int xc_interface_close(void *xch)
{
    return 0;
}

/* The start of 4.17's xc_dominfo_t; the rest of it is left as it is. */
struct dominfo {
    uint32_t domid, ssidref;
    unsigned int dying : 1, crashed : 1, shutdown : 1, paused : 1, blocked : 1, running : 1;
};

int xc_domain_getinfo(void *xch, uint32_t domid, unsigned int max, struct dominfo *info)
{
    char state = 'r';
    int fd = open_in("domain", domid, O_RDONLY | O_CLOEXEC);

    if (fd < 0)
        return 0;
    if (read(fd, &state, 1) != 1)
        state = 'r';
    close(fd);
    memset(info, 0, sizeof(*info));
    info->domid = domid;
    info->dying = state == 'd';
    info->shutdown = state == 's';
    info->running = state == 'r';
    return 1;
}

void *xengnttab_open(void *logger, unsigned int flags)
{
    return &handle;
}

int xengnttab_close(void *xgt)
{
    return 0;
}

int xengnttab_set_max_grants(void *xgt, uint32_t count)
{
    return 0;
}

void *xengnttab_map_grant_ref(void *xgt, uint32_t domid, uint32_t ref, int prot)
{
    int fd = open_in("ring", domid, O_RDWR | O_CLOEXEC);
    void *page;

    if (fd < 0)
        return NULL;
    page = mmap(NULL, 4096, prot, MAP_SHARED, fd, 0);
    close(fd);
    return page == MAP_FAILED ? NULL : page;
}

int xengnttab_unmap(void *xgt, void *start, uint32_t count)
{
    return munmap(start, (size_t)count * 4096);
}

void *xenevtchn_open(void *logger, unsigned int flags)
{
    events = open_in("to-daemon", ~0u, O_RDWR | O_NONBLOCK);
    return events < 0 ? NULL : &handle;
}

void *xenevtchn_fdopen(void *logger, int fd, unsigned int flags)
{
    events = fd;
    return &handle;
}

int xenevtchn_fd(void *xce)
{
    return events;
}

int xenevtchn_bind_virq(void *xce, unsigned int virq)
{
    return VIRQ_PORT;
}

int xenevtchn_bind_interdomain(void *xce, uint32_t domid, uint32_t port)
{
    return PORT_BASE + domid;
}

int xenevtchn_unbind(void *xce, uint32_t port)
{
    return 0;
}

int xenevtchn_unmask(void *xce, uint32_t port)
{
    return 0;
}

int xenevtchn_pending(void *xce)
{
    uint32_t port;

    return read(events, &port, sizeof(port)) == sizeof(port) ? (int)port : -1;
}

int xenevtchn_notify(void *xce, uint32_t port)
{
    /* Nobody may be reading: the trial looks at the rings, too. */
    int fd = open_in("from-daemon", ~0u, O_WRONLY | O_NONBLOCK | O_CLOEXEC);

    if (fd >= 0) {
        if (write(fd, &port, sizeof(port)) < 0)
            errno = 0;
        close(fd);
    }
    return 0;
}

int bind(int fd, const struct sockaddr *address, socklen_t length)
{
    const char *path = getenv("FAKE_SOCKET");
    struct sockaddr_un own = { .sun_family = AF_UNIX };

    if (!path || address->sa_family != AF_UNIX)
        return syscall(SYS_bind, fd, address, length);
    if (strlen(path) >= sizeof(own.sun_path)) {
        errno = ENAMETOOLONG;
        return -1;
    }
    strcpy(own.sun_path, path);
    return syscall(SYS_bind, fd, &own, sizeof(own));
}

int mkdir(const char *path, mode_t mode)
{
    if (!getenv("FAKE_SOCKET"))
        return mkdirat(AT_FDCWD, path, mode);
    errno = EEXIST;
    return -1;
}

int unlink(const char *path)
{
    if (!getenv("FAKE_SOCKET"))
        return unlinkat(AT_FDCWD, path, 0);
    errno = ENOENT;
    return -1;
}

int setrlimit(__rlimit_resource_t resource, const struct rlimit *limit)
{
    if (!getenv("FAKE_SOCKET"))
        return syscall(SYS_prlimit64, 0, resource, limit, NULL);
    return 0;
}
