#define _GNU_SOURCE
#include "uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "pager.h"
#include "seal.h"

/* Debian 12's headers are older than the call. */
#ifndef UFFDIO_MOVE
struct uffdio_move {
    __u64 dst, src, len, mode;
    __s64 move;
};
#define UFFDIO_MOVE _IOWR(UFFDIO, 0x05, struct uffdio_move)
#endif
#ifndef UFFD_FEATURE_MOVE
#define UFFD_FEATURE_MOVE (1u << 16)
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

/* Programs expect the lowest number that is free, and close what they do not know: so ours is high, but
 * not so high that the kernel's table grows much. */
#define HIGH 1024

void epc_uffd_close(int uffd) {
    syscall(SYS_close, uffd); /* `close` is ours, and protects it */
}

static int out_of_the_way(int uffd) {
    struct rlimit room;
    int end = getrlimit(RLIMIT_NOFILE, &room) == 0 && room.rlim_cur < HIGH ? (int)room.rlim_cur : HIGH;
    int moved = fcntl(uffd, F_DUPFD_CLOEXEC, end - 1);
    if (moved < 0) {
        return uffd; /* that number is taken and the limit leaves no higher one */
    }
    epc_uffd_close(uffd);
    return moved;
}

static int new_descriptor(void) {
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC);
    if (uffd >= 0 || errno != EPERM) {
        return uffd;
    }
    int device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device < 0) {
        errno = EPERM;
        return -1;
    }
    uffd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC);
    epc_uffd_close(device);
    return uffd;
}

int epc_uffd_open(char *reason, size_t reason_size) {
    int uffd = new_descriptor();
    if (uffd < 0) {
        snprintf(reason, reason_size,
                 "userfaultfd: %s (run as root, set vm.unprivileged_userfaultfd=1, or allow "
                 "/dev/userfaultfd)",
                 strerror(errno));
        return -1;
    }
    struct uffdio_api api = {.api = UFFD_API,
                             .features = UFFD_FEATURE_THREAD_ID | UFFD_FEATURE_MOVE};
    if (ioctl(uffd, UFFDIO_API, &api) != 0) {
        snprintf(reason, reason_size, "userfaultfd lacks UFFDIO_MOVE: Linux 6.8 or newer is needed");
        epc_uffd_close(uffd);
        return -1;
    }
    return out_of_the_way(uffd);
}

bool epc_uffd_register(int uffd, void *start, size_t bytes) {
    struct uffdio_register range = {.range = {(uintptr_t)start, bytes},
                                    .mode = UFFDIO_REGISTER_MODE_MISSING};
    return ioctl(uffd, UFFDIO_REGISTER, &range) == 0;
}

size_t epc_uffd_read(int uffd, struct epc_fault *faults, size_t room) {
    struct uffd_msg messages[16];
    if (room > 16) {
        room = 16;
    }
    ssize_t got = syscall(SYS_read, uffd, messages, room * sizeof *messages);
    size_t found = 0;
    for (size_t i = 0; got > 0 && i < (size_t)got / sizeof *messages; i++) {
        if (messages[i].event == UFFD_EVENT_PAGEFAULT) {
            uintptr_t address = (uintptr_t)messages[i].arg.pagefault.address;
            faults[found].address = address & ~(uintptr_t)(EPC_PAGE - 1);
            faults[found].tid = messages[i].arg.pagefault.feat.ptid;
            found++;
        }
    }
    return found;
}

/* Linux 6.18 may report a page that it has moved as an error. When a page's entry changes under its
 * eyes, say because the program touches it after somebody wrote /proc/PID/clear_refs, it tries again
 * (move_pages in mm/userfaultfd.c); the second try succeeds, but the first one's EAGAIN is still set, so
 * there is a third, which finds the page at its destination: EEXIST. It wakes nobody then. Nothing
 * but a page that has been moved can be there, since callers move to addresses that have none. */
size_t epc_uffd_move(int uffd, void *to, void *from, size_t pages) {
    size_t done = 0;
    while (done < pages) {
        struct uffdio_move move = {.dst = (uintptr_t)to + done * EPC_PAGE,
                                   .src = (uintptr_t)from + done * EPC_PAGE,
                                   .len = (pages - done) * EPC_PAGE};
        int failed = ioctl(uffd, UFFDIO_MOVE, &move);
        if (move.move > 0) {
            done += (size_t)move.move / EPC_PAGE;
        } else if (failed != 0 && errno == EEXIST) {
            epc_uffd_wake(uffd, (char *)to + done * EPC_PAGE);
            done++;
        } else if (failed != 0 && errno != EAGAIN) {
            break;
        }
    }
    return done;
}

size_t epc_uffd_copy(int uffd, void *to, const void *from, size_t pages) {
    size_t done = 0, bytes = pages * EPC_PAGE;
    while (done < bytes) {
        struct uffdio_copy copy = {.dst = (uintptr_t)to + done,
                                   .src = (uintptr_t)from + done,
                                   .len = bytes - done};
        int failed = ioctl(uffd, UFFDIO_COPY, &copy);
        if (copy.copy > 0) {
            done += (size_t)copy.copy;
        } else if (failed != 0 && errno != EAGAIN) {
            break;
        }
    }
    return done / EPC_PAGE;
}

void epc_uffd_wake(int uffd, void *page) {
    struct uffdio_range range = {(uintptr_t)page, EPC_PAGE};
    ioctl(uffd, UFFDIO_WAKE, &range);
}

void *epc_reserve(size_t bytes) {
    void *memory = (void *)syscall(SYS_mmap, NULL, bytes, PROT_READ | PROT_WRITE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return memory == MAP_FAILED ? NULL : memory;
}

void epc_discard(void *start, size_t bytes) {
    if (syscall(SYS_madvise, start, bytes, MADV_DONTNEED) != 0) {
        epc_die("memory can't be given up: is it locked (mlock)?");
    }
}

void epc_small_pages(void *start, size_t bytes) {
    syscall(SYS_madvise, start, bytes, MADV_NOHUGEPAGE);
}
