/* Transitions: an enclave makes no system call itself. It leaves, its host makes the call, it enters
 * again. So each call that moves data is charged one round trip, whatever program runs; that is how
 * the host reaches an enclave at all. Calls that only wait or manage memory are not charged. */
#define _GNU_SOURCE
#include <stddef.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include "export.h"
#include "pager.h"

/* The charge comes first: a thread that waits for data has left the enclave already. */
#define CALL(...) (epc_charge_entry(), (ssize_t)syscall(__VA_ARGS__))

EXPORT ssize_t read(int file, void *memory, size_t bytes) {
    return CALL(SYS_read, file, memory, bytes);
}

EXPORT ssize_t write(int file, const void *memory, size_t bytes) {
    return CALL(SYS_write, file, memory, bytes);
}

EXPORT ssize_t readv(int file, const struct iovec *parts, int count) {
    return CALL(SYS_readv, file, parts, count);
}

EXPORT ssize_t writev(int file, const struct iovec *parts, int count) {
    return CALL(SYS_writev, file, parts, count);
}

EXPORT ssize_t pread(int file, void *memory, size_t bytes, off_t offset) {
    return CALL(SYS_pread64, file, memory, bytes, offset);
}

EXPORT ssize_t pread64(int file, void *memory, size_t bytes, off_t offset) {
    return CALL(SYS_pread64, file, memory, bytes, offset);
}

EXPORT ssize_t pwrite(int file, const void *memory, size_t bytes, off_t offset) {
    return CALL(SYS_pwrite64, file, memory, bytes, offset);
}

EXPORT ssize_t pwrite64(int file, const void *memory, size_t bytes, off_t offset) {
    return CALL(SYS_pwrite64, file, memory, bytes, offset);
}

EXPORT ssize_t recv(int socket, void *memory, size_t bytes, int flags) {
    return CALL(SYS_recvfrom, socket, memory, bytes, flags, NULL, NULL);
}

EXPORT ssize_t send(int socket, const void *memory, size_t bytes, int flags) {
    return CALL(SYS_sendto, socket, memory, bytes, flags, NULL, 0);
}

EXPORT ssize_t recvfrom(int socket, void *memory, size_t bytes, int flags,
                        __SOCKADDR_ARG address, socklen_t *length) {
    return CALL(SYS_recvfrom, socket, memory, bytes, flags, address.__sockaddr__, length);
}

EXPORT ssize_t sendto(int socket, const void *memory, size_t bytes, int flags,
                      __CONST_SOCKADDR_ARG address, socklen_t length) {
    return CALL(SYS_sendto, socket, memory, bytes, flags, address.__sockaddr__, length);
}

EXPORT ssize_t recvmsg(int socket, struct msghdr *message, int flags) {
    return CALL(SYS_recvmsg, socket, message, flags);
}

EXPORT ssize_t sendmsg(int socket, const struct msghdr *message, int flags) {
    return CALL(SYS_sendmsg, socket, message, flags);
}
