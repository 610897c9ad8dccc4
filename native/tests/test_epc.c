/* The pager under torture. Each test is a process of its own, since a process has one pager:
 *   test_epc shadow|syscalls|tampered|replayed|rounds|lowered|ahead|cleared */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "epc/pager.h"
#include "epc/region.h"
#include "epc/seal.h"

#define SKIP 77
#define LIMIT 1024u
#define THREADS 4
#define PIECES 12
#define STEPS 1500

static struct epc_stats *stats;

#define CHECK(what)                                                              \
    do {                                                                         \
        if (!(what)) {                                                           \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #what); \
            _exit(1);                                                            \
        }                                                                        \
    } while (0)

static struct epc_stats *shared_stats(void) {
    void *memory = mmap(NULL, sizeof(struct epc_stats), PROT_READ | PROT_WRITE,
                        MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK(memory != MAP_FAILED);
    return memory;
}

static void before_fork(void) {
    epc_region_before_fork();
    epc_before_fork();
}

static void in_parent(void) {
    epc_after_fork_in_parent();
    epc_region_after_fork();
}

static void in_child(void) {
    epc_after_fork_in_child(shared_stats());
    epc_region_after_fork();
}

static void start(void) {
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
static uint64_t resident(bool all) {
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
static uint64_t next_random(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

struct piece {
    unsigned char *memory, *shadow;
    size_t bytes;
};

static void make(struct piece *piece, uint64_t *random) {
    piece->bytes = EPC_GRANULE + next_random(random) % (12 * EPC_GRANULE);
    piece->memory = epc_allocate(piece->bytes, 1, true);
    piece->shadow = calloc(1, piece->bytes);
    CHECK(piece->memory != NULL && piece->shadow != NULL);
}

static void resize(struct piece *piece, uint64_t *random) {
    struct piece larger;
    make(&larger, random);
    size_t common = piece->bytes < larger.bytes ? piece->bytes : larger.bytes;
    memcpy(larger.memory, piece->memory, common);
    memcpy(larger.shadow, piece->shadow, common);
    epc_release(piece->memory);
    free(piece->shadow);
    *piece = larger;
}

static void write_some(struct piece *piece, uint64_t *random) {
    size_t at = next_random(random) % piece->bytes;
    size_t length = next_random(random) % 20000;
    length = length < piece->bytes - at ? length : piece->bytes - at;
    unsigned char value = (unsigned char)next_random(random);
    memset(piece->memory + at, value, length);
    memset(piece->shadow + at, value, length);
}

static void check_all(const struct piece *pieces) {
    for (int i = 0; i < PIECES; i++) {
        CHECK(memcmp(pieces[i].memory, pieces[i].shadow, pieces[i].bytes) == 0);
    }
}

/* A child sees what its parent saw, and what it writes is its own. */
static void fork_once(struct piece *pieces, uint64_t *random) {
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        check_all(pieces);
        for (int i = 0; i < 40; i++) {
            write_some(&pieces[i % PIECES], random);
        }
        check_all(pieces);
        _exit(0);
    }
    for (int i = 0; i < 40; i++) {
        write_some(&pieces[(i + 1) % PIECES], random);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static bool with_fork;

static void *torture(void *number) {
    uint64_t random = 88172645463325252u + (uint64_t)(uintptr_t)number;
    struct piece pieces[PIECES];
    for (int i = 0; i < PIECES; i++) {
        make(&pieces[i], &random);
    }
    for (int step = 0; step < STEPS; step++) {
        struct piece *piece = &pieces[next_random(&random) % PIECES];
        uint64_t what = next_random(&random) % 100;
        if (what < 60) {
            write_some(piece, &random);
        } else if (what < 96) {
            CHECK(memcmp(piece->memory, piece->shadow, piece->bytes) == 0);
        } else {
            resize(piece, &random);
        }
        if (with_fork && step % 500 == 250) {
            fork_once(pieces, &random);
        }
        if (step % 50 == 0) {
            CHECK(resident(false) <= LIMIT);
        }
    }
    check_all(pieces);
    for (int i = 0; i < PIECES; i++) {
        epc_release(pieces[i].memory);
        free(pieces[i].shadow);
    }
    return NULL;
}

/* Promise: threads that write, read, resize and fork always see what they wrote, and never are more
 * pages resident than allowed. Their memory is about five times the limit. */
static void shadow(void) {
    pthread_t threads[THREADS];
    for (uintptr_t i = 0; i < THREADS; i++) {
        CHECK(pthread_create(&threads[i], NULL, torture, (void *)i) == 0);
    }
    for (int i = 0; i < THREADS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
    CHECK(atomic_load(&stats->loaded) > 1000);
    CHECK(atomic_load(&stats->peak_resident_pages) <= LIMIT);
    CHECK(atomic_load(&stats->allocated_bytes) == 0);
    CHECK(resident(true) <= LIMIT);
    CHECK(resident(false) == 0);
}

/* Promise: system calls may be given memory that is evicted. */
static void syscalls(void) {
    enum { BYTES = 1 << 20 };
    unsigned char *memory = epc_allocate(BYTES, 1, true), *copy = epc_allocate(BYTES, 1, true);
    int ends[2];
    CHECK(memory != NULL && copy != NULL && pipe(ends) == 0);
    for (size_t i = 0; i < BYTES; i++) {
        memory[i] = (unsigned char)(i * 7 + i / 4096);
    }
    for (size_t done = 0; done < BYTES; done += 32768) {
        epc_evict_all();
        CHECK(write(ends[1], memory + done, 32768) == 32768);
        epc_evict_all();
        for (size_t got = 0; got < 32768;) {
            ssize_t part = read(ends[0], copy + done + got, 32768 - got);
            CHECK(part > 0);
            got += (size_t)part;
        }
    }
    CHECK(memcmp(memory, copy, BYTES) == 0);
}

/* What a child does that must end with SIGABRT and these words on stderr. */
static void must_abort(void (*attack)(void), const char *words) {
    int ends[2];
    CHECK(pipe(ends) == 0);
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        dup2(ends[1], STDERR_FILENO);
        start();
        attack();
        _exit(0);
    }
    close(ends[1]);
    char said[1000] = "";
    size_t length = 0;
    ssize_t got;
    while ((got = read(ends[0], said + length, sizeof said - 1 - length)) > 0) {
        length += (size_t)got;
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    if (WIFEXITED(status) && WEXITSTATUS(status) == SKIP) {
        exit(SKIP);
    }
    CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
    CHECK(strstr(said, words) != NULL);
}

static unsigned char *evicted_page(size_t *page) {
    volatile char *memory = epc_allocate(EPC_GRANULE, 1, true);
    memory[0] = 42;
    epc_evict_all();
    *page = (size_t)((char *)(uintptr_t)memory - epc_region()) / EPC_PAGE;
    unsigned char *sealed = epc_backing_of_page(*page);
    CHECK(sealed != NULL && sealed[0] != 42);
    return sealed;
}

static void touch(size_t page) { (void)*(volatile char *)(epc_region() + page * EPC_PAGE); }

static void flip(void) {
    size_t page;
    evicted_page(&page)[1234] ^= 1;
    touch(page);
}

/* The ciphertext of an older state, authentic in its day. */
static void replay(void) {
    size_t page;
    unsigned char old[EPC_PAGE];
    unsigned char *sealed = evicted_page(&page);
    memcpy(old, sealed, EPC_PAGE);
    touch(page);
    epc_evict_all();
    CHECK(memcmp(old, sealed, EPC_PAGE) != 0); /* the same content under another version */
    memcpy(sealed, old, EPC_PAGE);
    touch(page);
}

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

int main(int count, char **arguments) {
    const char *name = count > 1 ? arguments[1] : "";
    if (strcmp(name, "tampered") == 0) {
        must_abort(flip, "backing store was modified");
        return 0;
    }
    if (strcmp(name, "replayed") == 0) {
        must_abort(replay, "backing store was modified");
        return 0;
    }
    start();
    if (strcmp(name, "shadow") == 0) {
        with_fork = count > 2 && strcmp(arguments[2], "fork") == 0;
        shadow();
    } else if (strcmp(name, "syscalls") == 0) {
        syscalls();
    } else if (strcmp(name, "rounds") == 0) {
        rounds();
    } else if (strcmp(name, "cleared") == 0) {
        cleared();
    } else if (strcmp(name, "ahead") == 0) {
        ahead();
    } else if (strcmp(name, "lowered") == 0) {
        lowered();
    } else {
        fprintf(stderr,
                "usage: test_epc shadow [fork]|syscalls|tampered|replayed|rounds|lowered|ahead|"
                "cleared\n");
        return 2;
    }
    return 0;
}
