/* The library that LD_PRELOAD puts into a process: its large allocations go to the region.
 *
 * malloc and its family from 64 KiB on, and anonymous private mmap that is readable and writable;
 * what is smaller, and code, stays where it was (its hot part is measured from outside and deducted
 * from the limit, see src/lasagna/tee/footprint.py). Protection of memory in the region is not
 * changed by mprotect: it has no effect there. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "export.h"
#include "host.h"
#include "pager.h"
#include "region.h"
#include "seal.h"

#define LARGE EPC_GRANULE

/* glibc's own, under the names that nobody replaces. */
extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);
extern void *__libc_memalign(size_t, size_t);
extern void __libc_free(void *);

static bool active; /* set once, when this library starts */
static size_t (*libc_usable_size)(void *);

static void before_fork(void) {
    epc_region_before_fork();
    epc_before_fork();
}

static void after_fork_in_parent(void) {
    epc_after_fork_in_parent();
    epc_region_after_fork();
}

static void after_fork_in_child(void) {
    epc_after_fork_in_child(epc_host_stats());
    epc_region_after_fork();
}

__attribute__((constructor)) static void start(void) {
    libc_usable_size = (size_t(*)(void *))(uintptr_t)dlsym(RTLD_NEXT, "malloc_usable_size");
    struct epc_config config;
    char reason[300];
    if (!epc_host_config(&config)) {
        return; /* not asked for */
    }
    struct epc_stats *stats = epc_host_stats();
    if (!epc_pager_start(&config, stats, reason, sizeof reason)) {
        epc_host_refuse(reason);
    }
    /* Handlers of libraries that started before us run inside of ours: they must not touch the region. */
    pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child);
    active = true;
}

static void *allocate(size_t bytes, size_t alignment, bool zeroed) {
    void *memory = epc_allocate(bytes, alignment, zeroed);
    if (memory == NULL) {
        errno = ENOMEM;
    }
    return memory;
}

static bool large(size_t bytes) { return active && bytes >= LARGE; }

EXPORT void *malloc(size_t bytes) { return large(bytes) ? allocate(bytes, 1, false) : __libc_malloc(bytes); }

EXPORT void free(void *memory) {
    if (memory != NULL && epc_contains(memory)) {
        int before = errno;
        epc_release(memory);
        errno = before;
    } else {
        __libc_free(memory);
    }
}

EXPORT void *calloc(size_t count, size_t size) {
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes)) {
        errno = ENOMEM;
        return NULL;
    }
    return large(bytes) ? allocate(bytes, 1, true) : __libc_calloc(count, size);
}

EXPORT size_t malloc_usable_size(void *memory) {
    if (memory == NULL) {
        return 0;
    }
    if (epc_contains(memory)) {
        return epc_usable(memory);
    }
    if (libc_usable_size == NULL) { /* a library that starts before us asks */
        libc_usable_size = (size_t(*)(void *))(uintptr_t)dlsym(RTLD_NEXT, "malloc_usable_size");
    }
    return libc_usable_size(memory);
}

EXPORT void *realloc(void *memory, size_t bytes) {
    bool here = memory != NULL && epc_contains(memory);
    if (memory == NULL) {
        return malloc(bytes);
    }
    if (!here && !large(bytes)) {
        return __libc_realloc(memory, bytes);
    }
    if (bytes == 0) {
        free(memory);
        return NULL;
    }
    size_t has = malloc_usable_size(memory);
    if (here && bytes <= has && bytes >= LARGE && bytes > has / 2) {
        return memory;
    }
    void *moved = malloc(bytes);
    if (moved != NULL) {
        memcpy(moved, memory, has < bytes ? has : bytes);
        free(memory);
    }
    return moved;
}

EXPORT void *reallocarray(void *memory, size_t count, size_t size) {
    size_t bytes;
    if (__builtin_mul_overflow(count, size, &bytes)) {
        errno = ENOMEM;
        return NULL;
    }
    return realloc(memory, bytes);
}

EXPORT void *memalign(size_t alignment, size_t bytes) {
    return large(bytes) ? allocate(bytes, alignment, false) : __libc_memalign(alignment, bytes);
}

EXPORT void *aligned_alloc(size_t alignment, size_t bytes) { return memalign(alignment, bytes); }

EXPORT int posix_memalign(void **memory, size_t alignment, size_t bytes) {
    if (alignment % sizeof(void *) != 0 || alignment == 0 || (alignment & (alignment - 1)) != 0) {
        return EINVAL;
    }
    int before = errno;
    void *found = memalign(alignment, bytes);
    errno = before;
    if (found == NULL) {
        return ENOMEM;
    }
    *memory = found;
    return 0;
}

EXPORT void *valloc(size_t bytes) { return memalign(EPC_PAGE, bytes); }

EXPORT void *pvalloc(size_t bytes) {
    return memalign(EPC_PAGE, (bytes + EPC_PAGE - 1) / EPC_PAGE * EPC_PAGE);
}

static void *system_mmap(void *address, size_t bytes, int protection, int flags, int file,
                         off_t offset) {
    return (void *)syscall(SYS_mmap, address, bytes, protection, flags, file, offset);
}

EXPORT void *mmap(void *address, size_t bytes, int protection, int flags, int file, off_t offset) {
    bool plain = address == NULL && protection == (PROT_READ | PROT_WRITE) &&
                 flags == (MAP_PRIVATE | MAP_ANONYMOUS);
    if (plain && large(bytes)) {
        void *memory = allocate(bytes, 1, true);
        return memory == NULL ? MAP_FAILED : memory;
    }
    if ((flags & MAP_FIXED) && epc_contains(address)) {
        epc_die("mmap with MAP_FIXED into emulated memory is not supported");
    }
    return system_mmap(address, bytes, protection, flags, file, offset);
}

EXPORT void *mmap64(void *address, size_t bytes, int protection, int flags, int file,
                    off_t offset) {
    return mmap(address, bytes, protection, flags, file, offset);
}

EXPORT int munmap(void *address, size_t bytes) {
    if (epc_contains(address)) {
        epc_unmap(address, bytes);
        return 0;
    }
    return (int)syscall(SYS_munmap, address, bytes);
}

EXPORT void *mremap(void *address, size_t bytes, size_t wanted, int flags, ...) {
    if (!epc_contains(address)) {
        va_list rest;
        va_start(rest, flags);
        void *to = (flags & MREMAP_FIXED) ? va_arg(rest, void *) : NULL;
        va_end(rest);
        if (to != NULL && epc_contains(to)) {
            epc_die("mremap into emulated memory is not supported");
        }
        return (void *)syscall(SYS_mremap, address, bytes, wanted, flags, to);
    }
    if (wanted <= bytes) {
        size_t kept = (wanted + EPC_PAGE - 1) / EPC_PAGE * EPC_PAGE;
        if (kept < bytes) {
            epc_unmap((char *)address + kept, bytes - kept);
        }
        return address;
    }
    if (flags != MREMAP_MAYMOVE) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    void *moved = allocate(wanted, 1, true);
    if (moved == NULL) {
        return MAP_FAILED;
    }
    memcpy(moved, address, bytes);
    epc_unmap(address, bytes);
    return moved;
}

EXPORT int madvise(void *address, size_t bytes, int advice) {
    if (!epc_contains(address)) {
        return (int)syscall(SYS_madvise, address, bytes, advice);
    }
    if (advice == MADV_DONTNEED) {
        epc_clear(address, bytes);
    }
    return 0; /* the rest is advice about pages that are the pager's */
}

EXPORT int mprotect(void *address, size_t bytes, int protection) {
    if (!epc_contains(address)) {
        return (int)syscall(SYS_mprotect, address, bytes, protection);
    }
    if (protection & PROT_EXEC) {
        errno = EACCES;
        return -1;
    }
    return 0;
}

/* Locked memory would never be evicted, and locking a part of the region would make the kernel split it.
 * An enclave's operating system can't lock EPC pages either. */
EXPORT int mlock(const void *address, size_t bytes) {
    return epc_overlaps(address, bytes) ? 0 : (int)syscall(SYS_mlock, address, bytes);
}

EXPORT int mlock2(const void *address, size_t bytes, unsigned flags) {
    return epc_overlaps(address, bytes) ? 0 : (int)syscall(SYS_mlock2, address, bytes, flags);
}

EXPORT int munlock(const void *address, size_t bytes) {
    return epc_overlaps(address, bytes) ? 0 : (int)syscall(SYS_munlock, address, bytes);
}

EXPORT int mlockall(int flags) { return active ? 0 : (int)syscall(SYS_mlockall, flags); }
