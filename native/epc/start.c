/* Starting the pager, measuring what it costs here, and starting it again after fork. */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "pager_state.h"
#include "region.h"
#include "uffd.h"

/* Whoever holds the lock runs with the priority of whoever waits for it: the reclaimer's is low. */
static void init_lock(void) {
    pthread_mutexattr_t inherit;
    pthread_mutexattr_init(&inherit);
    pthread_mutexattr_setprotocol(&inherit, PTHREAD_PRIO_INHERIT);
    pthread_mutex_init(&epc.lock, &inherit);
    pthread_mutexattr_destroy(&inherit);
}

static bool start_threads(void) {
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_cond_init(&epc.work, &monotonic);
    pthread_cond_init(&epc.freed, &monotonic);
    pthread_cond_init(&epc.settled, &monotonic);
    /* Signals are for the program's own threads. */
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t faults, reclaimer;
    bool started = pthread_create(&faults, NULL, epc_handle_faults, NULL) == 0 &&
                   pthread_create(&reclaimer, NULL, epc_reclaim, NULL) == 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (started) {
        /* What the driver does in the kernel waits for no other thread. Without the right to it the
         * emulator is slower than it could be, and calibration shows that. */
        struct sched_param first = {.sched_priority = 1};
        pthread_setschedparam(faults, SCHED_FIFO, &first);
        struct sched_param none = {0};
        pthread_setschedparam(reclaimer, SCHED_IDLE, &none);
        pthread_setname_np(faults, "epc-faults");
        pthread_setname_np(reclaimer, "epc-reclaim");
    }
    return started;
}

static bool watch(void) {
    return epc_uffd_register(epc.uffd, epc.region, epc.region_pages * EPC_PAGE) &&
           epc_uffd_register(epc.uffd, epc.slots, (size_t)epc.slot_count * EPC_PAGE);
}

/* Keep this memory out of what is measured as the program's. */
void epc_note_own(const void *start, size_t bytes) {
    static uint32_t count;
    EPC_SET(own_start[count], (uintptr_t)start);
    EPC_SET(own_bytes[count], bytes);
    count++;
}

static bool reserve_all(void) {
    epc.region = epc_reserve(epc.region_pages * EPC_PAGE);
    epc.slots = epc_reserve((size_t)epc.slot_count * EPC_PAGE);
    epc.backing = epc_reserve(epc.region_pages * EPC_PAGE);
    epc.pages = epc_reserve(epc.region_pages * sizeof *epc.pages);
    epc.empty = (struct slot_set){
        .taken = epc_reserve(epc.slot_count), .room = epc.slot_count, .free = epc.slot_count};
    epc.contents = epc_reserve(EPC_WINDOW_MAX * sizeof *epc.contents);
    if (!epc.region || !epc.slots || !epc.backing || !epc.pages || !epc.empty.taken ||
        !epc.contents) {
        return false;
    }
    epc_note_own(epc.region, epc.region_pages * EPC_PAGE);
    epc_note_own(epc.slots, (size_t)epc.slot_count * EPC_PAGE);
    epc_note_own(epc.backing, epc.region_pages * EPC_PAGE);
    epc_note_own(epc.pages, epc.region_pages * sizeof *epc.pages);
    epc_note_own(epc.empty.taken, epc.slot_count);
    epc_note_own(epc.contents, EPC_WINDOW_MAX * sizeof *epc.contents);
    /* An enclave's pages are small ones. */
    epc_small_pages(epc.region, epc.region_pages * EPC_PAGE);
    epc_small_pages(epc.slots, (size_t)epc.slot_count * EPC_PAGE);
    return true;
}

static int ascending(const void *a, const void *b) {
    uint64_t left = *(const uint64_t *)a, right = *(const uint64_t *)b;
    return (left > right) - (left < right);
}

/* The time of touching pages one by one, when the pager charges nothing and brings none ahead. */
static void touch(size_t first, size_t count, uint64_t *times) {
    for (size_t i = 0; i < count; i++) {
        uint64_t start = epc_now_ns();
        *(volatile char *)(epc.region + (first + i) * EPC_PAGE) = 1;
        times[i] = epc_now_ns() - start;
    }
}

static void reset_sums(void) {
    for (epc_counter *sum = &epc.stats->added; sum <= &epc.stats->entry_ns; sum++) {
        atomic_store(sum, 0);
    }
    EPC_SET(peak_resident_pages, EPC_GET(resident_pages));
    memset(epc.stats->threads, 0, sizeof epc.stats->threads);
}

/* What this machine takes for a load and an eviction, so that a charge adds the difference only. */
static void calibrate(const struct epc_costs *costs) {
    enum { COUNT = 64, ROUNDS = 5 };
    size_t first = epc.region_pages - COUNT;
    uint64_t times[ROUNDS * COUNT];
    touch(first, COUNT, times);
    uint64_t before = atomic_load(&epc.stats->load_ns);
    for (int round = 0; round < ROUNDS; round++) {
        epc_evict_all();
        touch(first, COUNT, times + round * COUNT);
    }
    qsort(times, ROUNDS * COUNT, sizeof *times, ascending);
    uint64_t whole_ns = times[ROUNDS * COUNT / 2];
    uint64_t inside_ns = (atomic_load(&epc.stats->load_ns) - before) / (ROUNDS * COUNT);
    uint64_t evicted = atomic_load(&epc.stats->evicted);
    EPC_SET(own_evict_ns, evicted > 0 ? atomic_load(&epc.stats->evict_ns) / evicted : 0);
    epc_drop(first, COUNT);
    pthread_mutex_lock(&epc.lock);
    epc.calibrating = false;
    pthread_mutex_unlock(&epc.lock);
    EPC_SET(own_latency_ns, whole_ns > inside_ns ? whole_ns - inside_ns : 0);
    EPC_SET(own_load_ns, inside_ns);
    reset_sums();
    EPC_SET(charge_load_ns, costs->load_ns);
    EPC_SET(charge_add_ns, costs->add_ns);
    EPC_SET(charge_evict_ns, costs->evict_ns);
    EPC_SET(charge_entry_ns, costs->entry_ns);
}

static void publish(struct epc_stats *stats, uint64_t limit) {
    epc.stats = stats;
    EPC_SET(pid, getpid());
    EPC_SET(limit_pages, limit);
    EPC_SET(region_pages, epc.region_pages);
}

bool epc_pager_start(const struct epc_config *config, struct epc_stats *stats, char *reason,
                     size_t reason_size) {
    if (config->limit_pages < EPC_MIN_PAGES || config->limit_pages > config->region_pages ||
        config->region_pages >= EPC_NONE) {
        snprintf(reason, reason_size, "the limit must be %u to %zu pages, not %zu", EPC_MIN_PAGES,
                 config->region_pages, config->limit_pages);
        return false;
    }
    epc.region_pages = config->region_pages;
    epc.slot_count = (uint32_t)config->limit_pages;
    publish(stats, config->limit_pages);
    epc.uffd = epc_uffd_open(reason, reason_size);
    if (epc.uffd < 0) {
        return false;
    }
    if (!reserve_all() || !epc_region_start() || !epc_random_key(epc.keys[0])) {
        snprintf(reason, reason_size, "address space for %zu pages can't be reserved",
                 config->region_pages);
        return false;
    }
    epc.key_count = 1;
    epc.calibrating = true;
    init_lock();
    queue_init(&epc.active);
    queue_init(&epc.probation);
    queue_init(&epc.out);
    if (!watch() || !start_threads()) {
        snprintf(reason, reason_size, "the kernel does not let the region be watched: %s",
                 strerror(errno));
        return false;
    }
    calibrate(&config->costs);
    atomic_store(&stats->magic, EPC_STATS_MAGIC);
    return true;
}

static struct epc_hold before_fork; /* of the thread that forks: guarded by the lock, which it has */

void epc_before_fork(void) {
    struct epc_hold before;
    epc_hold(&before);
    before_fork = before;
    epc.forking = true;
    struct timespec until = epc_patience();
    while (epc.busy > 0) {
        epc_wait(&epc.settled, &until, "a page was busy for a minute");
    }
    epc.forking = false;
}

void epc_after_fork_in_parent(void) {
    struct epc_hold before = before_fork;
    pthread_cond_broadcast(&epc.settled);
    epc_let_go(&before);
}

void epc_after_fork_in_child(struct epc_stats *stats) {
    char reason[200];
    epc_uffd_close(epc.uffd);
    init_lock();
    uint64_t limit = epc_limit();
    memcpy(stats, epc.stats, sizeof *stats);
    atomic_store(&stats->magic, 0); /* until the figures are the child's */
    publish(stats, limit);
    reset_sums(); /* so that a sum over processes counts nothing twice */
    epc.debt_ns = 0;
    if (epc.key_count == EPC_KEYS) {
        epc_die("too many generations of forked processes; start the program anew");
    }
    if (!epc_random_key(epc.keys[epc.key_count++])) {
        epc_die("no random key for the forked process");
    }
    epc.uffd = epc_uffd_open(reason, sizeof reason);
    if (epc.uffd < 0 || !watch() || !start_threads()) {
        epc_die("the forked process can't watch its memory");
    }
    atomic_store(&stats->magic, EPC_STATS_MAGIC);
    epc_restore(&before_fork);
}
