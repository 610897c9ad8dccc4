/* The program must not close the descriptor that its memory depends on, nor put another in its place: for
 * it there is no such descriptor. Many close all that they don't know, before they start a program or
 * become a daemon. */
#define _GNU_SOURCE
#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "export.h"
#include "next.h"
#include "pager.h"

#define REPLACED(each) each(close) each(dup2)
EPC_NEXT(REPLACED)

static bool ours(int file) { return file >= 0 && file == epc_descriptor(); }

static int refuse(void) {
    errno = EBADF;
    return -1;
}

EXPORT int close(int file) { return ours(file) ? refuse() : EPC_CALL_NEXT(close, file); }

EXPORT int dup2(int from, int to) {
    return ours(from) || ours(to) ? refuse() : EPC_CALL_NEXT(dup2, from, to);
}

EXPORT int dup3(int from, int to, int flags) {
    return ours(from) || ours(to) ? refuse() : (int)syscall(SYS_dup3, from, to, flags);
}

static int close_all(unsigned first, unsigned last, int flags) {
    return (int)syscall(SYS_close_range, first, last, flags);
}

EXPORT int close_range(unsigned first, unsigned last, int flags) {
    int file = epc_descriptor();
    unsigned number = (unsigned)file;
    if (file < 0 || number < first || number > last) {
        return close_all(first, last, flags);
    }
    if (number > first && close_all(first, number - 1, flags) != 0) {
        return -1;
    }
    return number < last ? close_all(number + 1, last, flags) : 0;
}

EXPORT void closefrom(int first) {
    close_range(first < 0 ? 0 : (unsigned)first, UINT_MAX, 0);
}
