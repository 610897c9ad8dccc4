/* What the pager counts. */
#define _GNU_SOURCE
#include <sys/wait.h>

#include "epc_rig.h"

#define THREADS 70 /* more than there are entries */
#define PAGES 100

static void *touch_all(void *memory) {
    for (size_t i = 0; i < PAGES; i++) {
        ((volatile char *)memory)[i * EPC_PAGE] = 1;
    }
    return NULL;
}

/* Sums over the table of threads; how many threads have an entry of their own. */
static uint32_t sum_up(uint64_t *pages, uint64_t *spent) {
    uint32_t count = 0;
    *pages = *spent = 0;
    for (uint32_t i = 0; i < EPC_STATS_THREADS; i++) {
        uint64_t tid = atomic_load(&stats->threads[i].tid);
        count += tid != 0 && tid != EPC_STATS_OTHERS;
        *pages += atomic_load(&stats->threads[i].faults);
        *spent += atomic_load(&stats->threads[i].fault_ns);
    }
    return count;
}

/* Promise: the threads' figures add up to the process's, however many threads there are. */
static void threads_add_up(void) {
    uint64_t pages, spent;
    for (int i = 0; i < THREADS; i++) {
        pthread_t thread; /* one after the other: all faults of one are its own */
        CHECK(pthread_create(&thread, NULL, touch_all, epc_allocate(PAGES * EPC_PAGE, 1, false)) == 0);
        CHECK(pthread_join(thread, NULL) == 0);
    }
    CHECK(sum_up(&pages, &spent) == EPC_STATS_THREADS - 1);
    CHECK(atomic_load(&stats->threads[EPC_STATS_THREADS - 1].tid) == EPC_STATS_OTHERS);
    CHECK(pages == atomic_load(&stats->added) + atomic_load(&stats->loaded));
    CHECK(pages >= THREADS * PAGES);
    CHECK(spent == atomic_load(&stats->load_ns));
}

/* Promise: time that faults wait for the reclaimer is counted, and not where none waits. */
static void waits_are_timed(void) {
    CHECK((atomic_load(&stats->waits) == 0) == (atomic_load(&stats->wait_ns) == 0));
    atomic_store(&stats->charge_evict_ns, 200000); /* a slow one */
    char *memory = epc_allocate(LIMIT * EPC_PAGE, 1, false);
    uint64_t waits = atomic_load(&stats->waits), waited = atomic_load(&stats->wait_ns);
    for (size_t i = 0; i < LIMIT; i++) {
        memory[i * EPC_PAGE] = 1;
    }
    waits = atomic_load(&stats->waits) - waits;
    waited = atomic_load(&stats->wait_ns) - waited;
    CHECK(waits > 0 && waited > waits * 10000);
    atomic_store(&stats->charge_evict_ns, 0);
}

/* Promise: a forked child counts from zero, and levels go on. */
static void a_child_begins_anew(void) {
    uint64_t evicted = atomic_load(&stats->evicted_pages);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        uint64_t pages, spent;
        CHECK(sum_up(&pages, &spent) == 0 && pages == 0 && spent == 0);
        CHECK(atomic_load(&stats->added) == 0 && atomic_load(&stats->loaded) == 0);
        CHECK(atomic_load(&stats->waits) == 0 && atomic_load(&stats->load_ns) == 0);
        CHECK(atomic_load(&stats->evicted) < LIMIT); /* its reclaimer may be at work already */
        CHECK(atomic_load(&stats->pid) == (uint64_t)getpid());
        CHECK(atomic_load(&stats->magic) == EPC_STATS_MAGIC);
        CHECK(atomic_load(&stats->evicted_pages) >= evicted);
        touch_all(epc_allocate(PAGES * EPC_PAGE, 1, false));
        CHECK(sum_up(&pages, &spent) == 1 && pages >= PAGES);
        _exit(0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
}

int main(void) {
    start();
    threads_add_up();
    waits_are_timed();
    a_child_begins_anew();
    return 0;
}
