#define _GNU_SOURCE
#include "pager.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "pager_state.h"
#include "uffd.h"

#define PATIENCE_S 60

struct pager epc = {.uffd = -1};

uint64_t epc_now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * UINT64_C(1000000000) + (uint64_t)now.tv_nsec;
}

_Noreturn void epc_die(const char *what) {
    static const char prefix[] = "lasagna epc: ";
    /* Not stdio: its locks may be held by whoever waits for us. */
    syscall(SYS_write, STDERR_FILENO, prefix, sizeof prefix - 1);
    syscall(SYS_write, STDERR_FILENO, what, strlen(what));
    syscall(SYS_write, STDERR_FILENO, "\n", 1);
    signal(SIGABRT, SIG_DFL); /* a handler could touch a page that nobody brings any more */
    abort();
}

void epc_spin_until(uint64_t time_ns) {
    while (epc_now_ns() < time_ns) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
}

struct timespec epc_patience(void) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += PATIENCE_S;
    return until;
}

void epc_wait(pthread_cond_t *condition, const struct timespec *until, const char *what) {
    if (pthread_cond_timedwait(condition, &epc.lock, until) == ETIMEDOUT) {
        epc_die(what);
    }
}

void epc_refuse_stack(void) {
    char here;
    if (epc_contains(&here)) {
        epc_die("a thread's stack was allocated from the heap, which is not supported");
    }
}

void epc_hold(struct epc_hold *before) {
    epc_refuse_stack();
    sigset_t all;
    sigfillset(&all);
    pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before->cancelling);
    pthread_sigmask(SIG_SETMASK, &all, &before->signals);
    pthread_mutex_lock(&epc.lock);
}

void epc_restore(const struct epc_hold *before) {
    pthread_sigmask(SIG_SETMASK, &before->signals, NULL);
    pthread_setcancelstate(before->cancelling, NULL);
}

void epc_let_go(const struct epc_hold *before) {
    pthread_mutex_unlock(&epc.lock);
    epc_restore(before);
}

uint32_t epc_limit(void) {
    uint64_t limit = atomic_load_explicit(&epc.stats->limit_pages, memory_order_relaxed);
    return limit < EPC_MIN_PAGES ? EPC_MIN_PAGES
           : limit > epc.slot_count ? epc.slot_count
                                    : (uint32_t)limit;
}

uint32_t epc_available(void) {
    uint32_t limit = epc_limit();
    return epc.allocated < limit ? limit - epc.allocated : 0;
}

void epc_begin(uint32_t page) {
    epc.pages[page].state = PAGE_BUSY;
    epc.busy++;
}

void epc_settle(uint32_t page, enum page_state state) {
    epc.pages[page].state = (uint8_t)state;
    epc.busy--;
    pthread_cond_broadcast(&epc.settled);
}

/* After fork two processes share a frame until one writes. Writing nothing makes it ours; the program
 * may use the page meanwhile, which no sanitizer can know to be harmless. */
__attribute__((noinline, no_sanitize("thread"))) static void make_exclusive(char *page) {
    atomic_fetch_or_explicit((_Atomic char *)page, 0, memory_order_relaxed);
}

static int move_one(char *to, char *from) {
    for (int tries = 0;; tries++) {
        if (epc_uffd_move(epc.uffd, to, from, 1) == 1) {
            return 0;
        }
        if (errno != EBUSY || tries == 4) {
            return errno;
        }
        make_exclusive(from);
    }
}

void epc_move(char *const *to, char *const *from, int *errors, uint32_t count) {
    for (uint32_t i = 0, run; i < count; i += run) {
        run = 1;
        while (i + run < count && to[i + run] == to[i] + run * EPC_PAGE &&
               from[i + run] == from[i] + run * EPC_PAGE) {
            run++;
        }
        size_t moved = epc_uffd_move(epc.uffd, to[i], from[i], run);
        for (uint32_t k = 0; k < run; k++) { /* the rest one by one, to know what is wrong */
            errors[i + k] = k < moved ? 0 : move_one(to[i + k], from[i + k]);
        }
    }
}

void epc_note_levels(void) {
    uint64_t resident = epc.allocated;
    EPC_SET(resident_pages, resident);
    EPC_SET(free_pages, epc_available());
    EPC_SET(evicted_pages, epc.out.count);
    if (resident > atomic_load_explicit(&epc.stats->peak_resident_pages, memory_order_relaxed)) {
        EPC_SET(peak_resident_pages, resident);
    }
}

char *epc_region(void) { return epc.region; }

size_t epc_region_pages(void) { return epc.region_pages; }

bool epc_contains(const void *address) {
    return (uintptr_t)address - (uintptr_t)epc.region < epc.region_pages * EPC_PAGE &&
           epc.region != NULL;
}

bool epc_overlaps(const void *address, size_t bytes) {
    uintptr_t start = (uintptr_t)epc.region, end = start + epc.region_pages * EPC_PAGE;
    return epc.region != NULL && (uintptr_t)address < end && bytes > 0 &&
           (epc_contains(address) || bytes > start - (uintptr_t)address);
}

int epc_descriptor(void) { return epc.uffd; }

/* Wait until no page of the range is in transition. Lock held, released meanwhile. */
static void settle_range(size_t first, size_t count) {
    struct timespec until = epc_patience();
    for (size_t i = first; i < first + count; i++) {
        if (epc.pages[i].state == PAGE_BUSY) {
            epc_wait(&epc.settled, &until, "a page was busy for a minute");
            i = first - 1; /* others may have become busy meanwhile */
        }
    }
}

void epc_drop(size_t first, size_t count) {
    struct epc_hold before;
    epc_hold(&before);
    settle_range(first, count);
    uint32_t mapped = 0;
    for (size_t i = first; i < first + count; i++) {
        struct page *page = &epc.pages[i];
        if (page->state == PAGE_MAPPED) {
            queue_remove(epc.pages, &epc.active, (uint32_t)i);
            mapped++;
        } else if (page->state == PAGE_PROBATION) {
            queue_remove(epc.pages, &epc.probation, (uint32_t)i);
            epc_discard(epc_slot_address(page->slot), EPC_PAGE);
            slot_give(&epc.empty, page->slot);
            epc.allocated--;
        } else if (page->state == PAGE_OUT) {
            queue_remove(epc.pages, &epc.out, (uint32_t)i);
        }
        page->state = PAGE_ABSENT;
    }
    if (mapped > 0) {
        epc_discard(epc.region + first * EPC_PAGE, count * EPC_PAGE);
        epc.allocated -= mapped;
    }
    epc_note_levels();
    pthread_cond_broadcast(&epc.freed);
    epc_let_go(&before);
}

void epc_charge_entry(void) {
    if (epc.stats == NULL) {
        return; /* before the start, or without the emulator */
    }
    uint64_t charge = EPC_GET(charge_entry_ns);
    epc_spin_until(epc_now_ns() + charge);
    EPC_ADD(entries, 1);
    EPC_ADD(entry_ns, charge);
}

unsigned char *epc_backing_of_page(size_t page) {
    struct epc_hold before;
    epc_hold(&before);
    bool out = epc.pages[page].state == PAGE_OUT;
    epc_let_go(&before);
    return out ? epc_backing_address((uint32_t)page) : NULL;
}
