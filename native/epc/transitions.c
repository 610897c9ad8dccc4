/* Transitions: an enclave makes no system call itself. It leaves, its host makes the call, it enters
 * again. So each call that moves data is charged one round trip, whatever program runs; that is how
 * the host reaches an enclave at all. Calls that only wait or manage memory are not charged. */
#define _GNU_SOURCE
#include <sys/socket.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#include "export.h"
#include "next.h"
#include "pager.h"

#define MOVE_DATA(each)                                                                       \
    each(read) each(write) each(readv) each(writev) each(pread) each(pread64) each(pwrite)    \
    each(pwrite64) each(recv) each(send) each(recvfrom) each(sendto) each(recvmsg) each(sendmsg)
EPC_NEXT(MOVE_DATA)

/* The charge comes first: a thread that waits for data has left the enclave already. */
#define CALL(...) (epc_charge_entry(), EPC_CALL_NEXT(__VA_ARGS__))

EXPORT ssize_t read(int file, void *memory, size_t bytes) {
    return CALL(read, file, memory, bytes);
}

EXPORT ssize_t write(int file, const void *memory, size_t bytes) {
    return CALL(write, file, memory, bytes);
}

EXPORT ssize_t readv(int file, const struct iovec *parts, int count) {
    return CALL(readv, file, parts, count);
}

EXPORT ssize_t writev(int file, const struct iovec *parts, int count) {
    return CALL(writev, file, parts, count);
}

EXPORT ssize_t pread(int file, void *memory, size_t bytes, off_t offset) {
    return CALL(pread, file, memory, bytes, offset);
}

EXPORT ssize_t pread64(int file, void *memory, size_t bytes, off_t offset) {
    return CALL(pread64, file, memory, bytes, offset);
}

EXPORT ssize_t pwrite(int file, const void *memory, size_t bytes, off_t offset) {
    return CALL(pwrite, file, memory, bytes, offset);
}

EXPORT ssize_t pwrite64(int file, const void *memory, size_t bytes, off_t offset) {
    return CALL(pwrite64, file, memory, bytes, offset);
}

EXPORT ssize_t recv(int socket, void *memory, size_t bytes, int flags) {
    return CALL(recv, socket, memory, bytes, flags);
}

EXPORT ssize_t send(int socket, const void *memory, size_t bytes, int flags) {
    return CALL(send, socket, memory, bytes, flags);
}

EXPORT ssize_t recvfrom(int socket, void *memory, size_t bytes, int flags,
                        __SOCKADDR_ARG address, socklen_t *length) {
    return CALL(recvfrom, socket, memory, bytes, flags, address, length);
}

EXPORT ssize_t sendto(int socket, const void *memory, size_t bytes, int flags,
                      __CONST_SOCKADDR_ARG address, socklen_t length) {
    return CALL(sendto, socket, memory, bytes, flags, address, length);
}

EXPORT ssize_t recvmsg(int socket, struct msghdr *message, int flags) {
    return CALL(recvmsg, socket, message, flags);
}

EXPORT ssize_t sendmsg(int socket, const struct msghdr *message, int flags) {
    return CALL(sendmsg, socket, message, flags);
}
