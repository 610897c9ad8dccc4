#define _GNU_SOURCE
#include "pager.h"

#include <errno.h>
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
    abort();
}

bool epc_spin_until(uint64_t time_ns) {
    if (epc_now_ns() > time_ns) {
        return false;
    }
    while (epc_now_ns() < time_ns) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    return true;
}

void epc_wait(pthread_cond_t *condition, const char *what) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += PATIENCE_S;
    if (pthread_cond_timedwait(condition, &epc.lock, &until) == ETIMEDOUT) {
        epc_die(what);
    }
}

uint32_t epc_limit(void) {
    uint64_t limit = atomic_load_explicit(&epc.stats->limit_pages, memory_order_relaxed);
    return limit < EPC_MIN_PAGES ? EPC_MIN_PAGES
           : limit > epc.slot_count ? epc.slot_count
                                    : (uint32_t)limit;
}

uint32_t epc_available(void) {
    uint32_t limit = epc_limit();
    if (epc.allocated > limit) {
        uint32_t excess = epc.allocated - limit;
        return epc.frames.count > excess ? epc.frames.count - excess : 0;
    }
    return epc.frames.count + (limit - epc.allocated);
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

int epc_move(char *to, char *from) {
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

static void note_levels(void) {
    uint64_t resident = epc.allocated;
    EPC_SET(resident_pages, resident);
    EPC_SET(free_pages, epc_available());
    if (resident > atomic_load_explicit(&epc.stats->peak_resident_pages, memory_order_relaxed)) {
        EPC_SET(peak_resident_pages, resident);
    }
}

static void note_fault(uint32_t tid, uint64_t spent) {
    static uint32_t last;
    struct epc_thread_stats *threads = epc.stats->threads;
    for (uint32_t tried = 0; tried < EPC_STATS_THREADS; tried++) {
        struct epc_thread_stats *entry = &threads[(last + tried) % EPC_STATS_THREADS];
        uint64_t owner = atomic_load_explicit(&entry->tid, memory_order_relaxed);
        if (owner == 0 || owner == tid) {
            last = (last + tried) % EPC_STATS_THREADS;
            atomic_store_explicit(&entry->tid, tid, memory_order_relaxed);
            atomic_fetch_add_explicit(&entry->faults, 1, memory_order_relaxed);
            atomic_fetch_add_explicit(&entry->fault_ns, spent, memory_order_relaxed);
            return;
        }
    }
}

/* A slot with a free frame, or EPC_NONE when a frame may be added. Lock held, released meanwhile. */
static uint32_t take_frame(void) {
    if (epc_available() == 0) {
        EPC_ADD(waits, 1);
    }
    while (epc_available() == 0) {
        pthread_cond_signal(&epc.work);
        epc_wait(&epc.freed, "no page could be evicted for a minute: everything is pinned");
    }
    uint32_t slot = EPC_NONE;
    if (epc.frames.count > 0) {
        slot = ring_pop(&epc.frames);
    } else {
        epc.allocated++;
    }
    if (epc_available() < EPC_LOW) {
        pthread_cond_signal(&epc.work);
    }
    return slot;
}

/* Give a page back that was on probation. Lock held, released meanwhile. */
static void second_chance(uint32_t number) {
    uint32_t slot = epc.pages[number].slot;
    queue_remove(epc.pages, &epc.probation, number);
    epc_begin(number);
    pthread_mutex_unlock(&epc.lock);
    if (epc_move(epc_page_address(number), epc_slot_address(slot)) != 0) {
        epc_die("a page on probation can't be mapped again");
    }
    pthread_mutex_lock(&epc.lock);
    ring_push(&epc.empty, slot);
    queue_push(epc.pages, &epc.active, number);
    epc_settle(number, PAGE_MAPPED);
    EPC_ADD(second_chances, 1);
    epc.debt_ns += atomic_load_explicit(&epc.stats->own_latency_ns, memory_order_relaxed);
}

/* Spin until a fault that was read at `start` has taken what it is charged. */
static void charge_fault(uint64_t start, uint64_t charge) {
    uint64_t latency = atomic_load_explicit(&epc.stats->own_latency_ns, memory_order_relaxed);
    uint64_t inside = charge > latency ? charge - latency : 0;
    uint64_t spent = epc_now_ns() - start;
    if (spent >= inside) {
        EPC_ADD(late_loads, charge > 0);
        return;
    }
    uint64_t repaid = inside - spent < epc.debt_ns ? inside - spent : epc.debt_ns;
    epc.debt_ns -= repaid;
    epc_spin_until(start + inside - repaid);
}

/* Bring a page that has no frame into memory. Lock held, released meanwhile. */
static void load(uint32_t number, struct epc_sealer *const *sealers, uint64_t start, uint32_t tid) {
    static _Alignas(64) unsigned char fresh[EPC_PAGE];
    struct page *page = &epc.pages[number];
    bool sealed = page->state == PAGE_OUT;
    epc_begin(number);
    uint32_t slot = take_frame();
    pthread_mutex_unlock(&epc.lock);

    unsigned char *plain = slot == EPC_NONE ? fresh : (unsigned char *)epc_slot_address(slot);
    if (!sealed) {
        memset(plain, 0, EPC_PAGE);
    } else if (!epc_open(sealers[page->key], number, page->version, epc_backing_address(number),
                         page->tag, plain)) {
        epc_die("a page does not open: its backing store was modified");
    }
    charge_fault(start, sealed ? epc.costs.load_ns : epc.costs.add_ns);
    uint64_t ready = epc_now_ns();
    char *address = epc_page_address(number);
    int error = slot == EPC_NONE ? epc_uffd_copy(epc.uffd, address, plain)
                                 : epc_move(address, (char *)plain);
    if (error != 0 && error != EEXIST) {
        epc_die("a page can't be mapped");
    }

    pthread_mutex_lock(&epc.lock);
    if (slot != EPC_NONE) {
        ring_push(&epc.empty, slot);
    }
    queue_push(epc.pages, &epc.active, number);
    epc_settle(number, PAGE_MAPPED);
    uint64_t spent =
        ready - start + atomic_load_explicit(&epc.stats->own_latency_ns, memory_order_relaxed);
    if (sealed) {
        EPC_ADD(loaded, 1);
        atomic_fetch_sub_explicit(&epc.stats->evicted_pages, 1, memory_order_relaxed);
    } else {
        EPC_ADD(added, 1);
    }
    EPC_ADD(load_ns, spent);
    note_fault(tid, spent);
    note_levels();
}

static void resolve(const struct epc_fault *fault, struct epc_sealer *const *sealers) {
    uint64_t start = epc_now_ns();
    uint32_t number = (uint32_t)((fault->address - (uintptr_t)epc.region) / EPC_PAGE);
    pthread_mutex_lock(&epc.lock);
    while (epc.pages[number].state == PAGE_BUSY) {
        epc_wait(&epc.settled, "a page was busy for a minute");
    }
    switch (epc.pages[number].state) {
    case PAGE_PROBATION:
        second_chance(number);
        break;
    case PAGE_ABSENT:
    case PAGE_OUT:
        load(number, sealers, start, fault->tid);
        break;
    default: /* another thread's fault brought it */
        epc_uffd_wake(epc.uffd, (void *)fault->address);
    }
    pthread_mutex_unlock(&epc.lock);
}

/* Faults of one enclave are serial, as in the driver, where they hold the enclave's lock. */
void *epc_handle_faults(void *unused) {
    (void)unused;
    struct epc_sealer *sealers[EPC_KEYS];
    for (uint8_t i = 0; i < epc.key_count; i++) {
        sealers[i] = epc_sealer_new(epc.keys[i]);
        if (sealers[i] == NULL) {
            epc_die("libcrypto gives no cipher");
        }
    }
    for (;;) {
        struct epc_fault faults[EPC_BATCH];
        size_t count = epc_uffd_read(epc.uffd, faults, EPC_BATCH);
        for (size_t i = 0; i < count; i++) {
            resolve(&faults[i], sealers);
        }
    }
    return NULL;
}

char *epc_region(void) { return epc.region; }

size_t epc_region_pages(void) { return epc.region_pages; }

bool epc_contains(const void *address) {
    return (uintptr_t)address - (uintptr_t)epc.region < epc.region_pages * EPC_PAGE &&
           epc.region != NULL;
}

void epc_drop(size_t first, size_t count) {
    pthread_mutex_lock(&epc.lock);
    uint32_t mapped = 0;
    for (size_t i = first; i < first + count; i++) {
        struct page *page = &epc.pages[i];
        while (page->state == PAGE_BUSY) {
            epc_wait(&epc.settled, "a page was busy for a minute");
        }
        if (page->state == PAGE_MAPPED) {
            queue_remove(epc.pages, &epc.active, (uint32_t)i);
            mapped++;
        } else if (page->state == PAGE_PROBATION) {
            queue_remove(epc.pages, &epc.probation, (uint32_t)i);
            ring_push(&epc.frames, page->slot);
        } else if (page->state == PAGE_OUT) {
            atomic_fetch_sub_explicit(&epc.stats->evicted_pages, 1, memory_order_relaxed);
        }
        page->state = PAGE_ABSENT;
    }
    if (mapped > 0) {
        epc_discard(epc.region + first * EPC_PAGE, count * EPC_PAGE);
        epc.allocated -= mapped;
    }
    note_levels();
    pthread_cond_broadcast(&epc.freed);
    pthread_mutex_unlock(&epc.lock);
}

void epc_charge_entry(void) {
    if (epc.stats == NULL) {
        return; /* before the start, or without the emulator */
    }
    epc_spin_until(epc_now_ns() + epc.costs.entry_ns);
    EPC_ADD(entries, 1);
}

unsigned char *epc_backing_of_page(size_t page) {
    pthread_mutex_lock(&epc.lock);
    bool out = epc.pages[page].state == PAGE_OUT;
    pthread_mutex_unlock(&epc.lock);
    return out ? epc_backing_address((uint32_t)page) : NULL;
}
