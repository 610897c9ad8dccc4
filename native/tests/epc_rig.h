/* What the tests of the pager share. Each test is a process of its own, since a process has one pager. */
#ifndef LASAGNA_EPC_RIG_H
#define LASAGNA_EPC_RIG_H

#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "epc/pager.h"
#include "epc/region.h"
#include "epc/seal.h"

#define SKIP 77
#define LIMIT 1024u

static struct epc_stats *stats;

#define CHECK(what)                                                              \
    do {                                                                         \
        if (!(what)) {                                                           \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #what); \
            _exit(1);                                                            \
        }                                                                        \
    } while (0)

static inline struct epc_stats *shared_stats(void) {
    void *memory = mmap(NULL, sizeof(struct epc_stats), PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    return memory;
}

static inline void before_fork(void) {
    epc_region_before_fork();
    epc_before_fork();
}

static inline void in_parent(void) {
    epc_after_fork_in_parent();
    epc_region_after_fork();
}

static inline void in_child(void) {
    stats = shared_stats();
    epc_after_fork_in_child(stats);
    epc_region_after_fork();
}

static inline void start(void) {
    char reason[300];
    struct epc_config config = {.limit_pages = LIMIT, .region_pages = 1u << 18};
    stats = shared_stats();
    if (!epc_pager_start(&config, stats, reason, sizeof reason)) {
        printf("skipped: %s\n", reason);
        exit(SKIP);
    }
    CHECK(pthread_atfork(before_fork, in_parent, in_child) == 0);
}

/* Resident pages by the kernel's own account: of the region alone, or with the frames beside it.
 * Those are the mappings with the flag um, userfaultfd missing. A page that moves from one to the
 * other while the kernel lists them may be counted twice, so `all` wants a pager at rest. */
static inline uint64_t resident(bool all) {
    FILE *smaps = fopen("/proc/self/smaps", "r");
    CHECK(smaps != NULL);
    char line[512];
    uintptr_t from = 0, to, start_of_region = (uintptr_t)epc_region();
    uint64_t kilobytes = 0, sum = 0;
    while (fgets(line, sizeof line, smaps) != NULL) {
        sscanf(line, "%lx-%lx ", &from, &to);
        sscanf(line, "Rss: %lu kB", &kilobytes);
        if (strncmp(line, "VmFlags:", 8) == 0 && strstr(line, " um") != NULL &&
            (all || from == start_of_region)) {
            sum += kilobytes * 1024 / EPC_PAGE;
        }
    }
    fclose(smaps);
    return sum;
}

/* xorshift64: one for each thread, so that a run is the same every time. */
static inline uint64_t next_random(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

#endif
