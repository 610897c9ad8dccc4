/* What the pager does with memory that comes and goes:
 *   test_epc_memory rounds|lowered|cleared|ahead|split */
#define _GNU_SOURCE
#include <sched.h>
#include <sys/syscall.h>

#include "epc_rig.h"

/* Promise: 10,000 rounds of allocating and freeing take no more memory than the largest of them, and
 * memory that was asked for as zeros is. */
static void rounds(void) {
    uint64_t random = 42;
    for (int round = 0; round < 10000; round++) {
        size_t bytes = EPC_GRANULE + next_random(&random) % EPC_GRANULE;
        bool zeroed = round % 2 == 0;
        char *memory = epc_allocate(bytes, round % 100 == 0 ? 2 * EPC_GRANULE : 1, zeroed);
        CHECK(memory != NULL && (!zeroed || memory[bytes - 1] == 0));
        memset(memory, 1, bytes);
        if (round % 3 == 0) {
            epc_unmap(memory, bytes);
        } else {
            epc_release(memory);
        }
    }
    CHECK(atomic_load(&stats->allocated_bytes) == 0);
    uint64_t left = resident(false) + atomic_load(&stats->evicted_pages);
    CHECK(left * EPC_PAGE <= 10 * EPC_GRANULE); /* one piece of each size: 1, 2, 3 and 4 granules */
    CHECK(atomic_load(&stats->added) * EPC_PAGE <= 10 * EPC_GRANULE);

    char *memory = epc_allocate(8 * EPC_PAGE + 8 * EPC_GRANULE, 1, true);
    epc_unmap(memory, 4 * EPC_PAGE);
    epc_unmap(memory, 4 * EPC_PAGE); /* again: nothing more is gone */
    CHECK(atomic_load(&stats->allocated_bytes) > 0);
    epc_unmap(memory + 4 * EPC_PAGE, 4 * EPC_PAGE + 8 * EPC_GRANULE);
    CHECK(atomic_load(&stats->allocated_bytes) == 0);

    memory = epc_allocate(9 * EPC_GRANULE, 1, true); /* of a size class of 10 */
    epc_unmap(memory + 8 * EPC_GRANULE, 2 * EPC_GRANULE); /* with what nobody asked for */
    CHECK(atomic_load(&stats->allocated_bytes) > 0);
    epc_unmap(memory, 8 * EPC_GRANULE);
    CHECK(atomic_load(&stats->allocated_bytes) == 0);
    memory = epc_allocate(9 * EPC_GRANULE, 1, true);
    epc_unmap(memory, 10 * EPC_GRANULE);
    CHECK(atomic_load(&stats->allocated_bytes) == 0);
}

/* Promise: a limit that the host lowers holds from then on. */
static void lowered(void) {
    enum { PAGES = 2 * LIMIT };
    char *memory = epc_allocate(PAGES * EPC_PAGE, 1, true);
    for (int round = 0; round < 3; round++) {
        if (round == 1) {
            atomic_store(&stats->limit_pages, LIMIT / 2);
        }
        for (size_t i = 0; i < PAGES; i++) {
            memory[i * EPC_PAGE] = (char)(i + (size_t)round);
        }
    }
    CHECK(resident(false) <= LIMIT / 2);
    for (size_t i = 0; i < PAGES; i++) {
        CHECK(memory[i * EPC_PAGE] == (char)(i + 2));
    }
    /* Also for a program that has no faults. */
    atomic_store(&stats->limit_pages, EPC_MIN_PAGES);
    uint64_t deadline = epc_now_ns() + UINT64_C(20000000000);
    while (resident(true) > EPC_MIN_PAGES) {
        CHECK(epc_now_ns() < deadline);
        sched_yield();
    }
}

#define HALF (LIMIT * 3 / 4)

/* Clear a part again and again, beside another thread that clears its neighbour. */
static void *clear_part(void *part) {
    char *memory = part;
    for (int round = 0; round < 60; round++) {
        for (size_t i = 0; i < HALF; i++) {
            CHECK(memory[i * EPC_PAGE] == 0);
            memory[i * EPC_PAGE] = 1;
        }
        for (size_t i = 0; i < HALF; i += 32) {
            epc_clear(memory + i * EPC_PAGE, 32 * EPC_PAGE);
        }
    }
    return NULL;
}

/* Promise: memory that is cleared reads as zeros, whatever is under way with its pages. */
static void cleared(void) {
    char *memory = epc_allocate(2 * HALF * EPC_PAGE, 1, true);
    pthread_t first, second;
    CHECK(pthread_create(&first, NULL, clear_part, memory) == 0);
    CHECK(pthread_create(&second, NULL, clear_part, memory + HALF * EPC_PAGE) == 0);
    pthread_join(first, NULL);
    pthread_join(second, NULL);
    CHECK(resident(true) <= LIMIT);
    CHECK(atomic_load(&stats->own_latency_ns) > 0);
}

/* Promise: what a program touches again and again in the same order comes ahead, in whatever order
 * that is, forwards or backwards; and holds what was written. */
static void ahead(void) {
    enum { PAGES = 4 * LIMIT, STEP = 1021 /* a prime: no neighbours */ };
    char *memory = epc_allocate(PAGES * EPC_PAGE, 1, false);
    for (int round = 0; round < 4; round++) {
        uint64_t loaded = atomic_load(&stats->loaded), early = atomic_load(&stats->ahead);
        for (size_t i = 0; i < PAGES; i++) {
            size_t page = (round < 3 ? i : PAGES - 1 - i) * STEP % PAGES;
            CHECK(round == 0 || memory[page * EPC_PAGE] == (char)page);
            memory[page * EPC_PAGE] = (char)page;
        }
        loaded = atomic_load(&stats->loaded) - loaded;
        early = atomic_load(&stats->ahead) - early;
        CHECK(round == 0 || (loaded > PAGES / 2 && early > loaded * 8 / 10));
        CHECK(resident(false) <= LIMIT);
    }
}

/* Promise: pages come and go as ever where the kernel has split the region into several mappings. */
static void split(void) {
    enum { PAGES = 4 * LIMIT };
    char *memory = epc_allocate(PAGES * EPC_PAGE, 1, false);
    for (size_t i = 3; i < PAGES; i += 50) { /* by any call that we don't replace */
        CHECK(syscall(SYS_madvise, memory + i * EPC_PAGE, 5 * EPC_PAGE, MADV_DONTDUMP) == 0);
    }
    for (int round = 0; round < 3; round++) {
        for (size_t i = 0; i < PAGES; i++) {
            CHECK(round == 0 || memory[i * EPC_PAGE] == (char)i);
            memory[i * EPC_PAGE] = (char)i;
        }
    }
    CHECK(atomic_load(&stats->ahead) > PAGES);
    epc_clear(memory, PAGES * EPC_PAGE);
    CHECK(memory[0] == 0 && memory[(PAGES - 1) * EPC_PAGE] == 0);
}

int main(int count, char **arguments) {
    const char *name = count > 1 ? arguments[1] : "";
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {{"rounds", rounds}, {"lowered", lowered}, {"cleared", cleared}, {"ahead", ahead}, {"split", split}};
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        if (strcmp(name, tests[i].name) == 0) {
            start();
            tests[i].run();
            return 0;
        }
    }
    fprintf(stderr, "usage: test_epc_memory rounds|lowered|cleared|ahead|split\n");
    return 2;
}
