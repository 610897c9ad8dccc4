/* The pager under torture and under attack:
 *   test_epc shadow [fork]|syscalls|tampered|replayed|astray */
#define _GNU_SOURCE
#include <sys/socket.h>
#include <sys/wait.h>

#include "epc/pager_state.h"
#include "epc_rig.h"

#define THREADS 4
#define PIECES 12
#define STEPS 1500

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

/* Mapped pages and frames on probation, with the pager held still: within the limit, and no more than
 * the pager says. */
static void check_limit(void) {
    before_fork();
    uint64_t pages = resident(true), said = atomic_load(&stats->resident_pages);
    in_parent();
    CHECK(pages > 0 && pages <= said && said <= LIMIT);
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
            check_limit();
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

static ssize_t write_it(int file, const void *memory, size_t bytes) {
    return write(file, memory, bytes);
}
static ssize_t read_it(int file, void *memory, size_t bytes) { return read(file, memory, bytes); }
static ssize_t send_it(int file, const void *memory, size_t bytes) {
    return send(file, memory, bytes, 0);
}
static ssize_t receive_it(int file, void *memory, size_t bytes) {
    return recv(file, memory, bytes, 0);
}

/* Through here and there, all of it from and into pages that are evicted. */
static void transfer(int here, int there, ssize_t (*put)(int, const void *, size_t),
                     ssize_t (*get)(int, void *, size_t)) {
    enum { BYTES = 1 << 20, PART = 32768 };
    unsigned char *memory = epc_allocate(BYTES, 1, true), *copy = epc_allocate(BYTES, 1, true);
    CHECK(memory != NULL && copy != NULL);
    for (size_t i = 0; i < BYTES; i++) {
        memory[i] = (unsigned char)(i * 7 + i / 4096);
    }
    for (size_t done = 0; done < BYTES; done += PART) {
        epc_evict_all();
        CHECK(put(there, memory + done, PART) == PART);
        epc_evict_all();
        for (size_t got = 0; got < PART;) {
            ssize_t part = get(here, copy + done + got, PART - got);
            CHECK(part > 0);
            got += (size_t)part;
        }
    }
    CHECK(memcmp(memory, copy, BYTES) == 0);
    epc_release(memory);
    epc_release(copy);
}

/* Promise: system calls may be given memory that is evicted. */
static void syscalls(void) {
    int ends[2], stream[2], packets[2];
    CHECK(pipe(ends) == 0 && socketpair(AF_UNIX, SOCK_STREAM, 0, stream) == 0 &&
          socketpair(AF_UNIX, SOCK_SEQPACKET, 0, packets) == 0);
    transfer(ends[0], ends[1], write_it, read_it);
    transfer(stream[0], stream[1], send_it, receive_it);
    transfer(packets[0], packets[1], send_it, receive_it);
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

/* A pointer that went astray. */
static void touch_a_frame(void) { (void)*(volatile char *)epc_slot_address(1); }

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
    if (strcmp(name, "astray") == 0) {
        must_abort(touch_a_frame, "memory that it was never given");
        return 0;
    }
    start();
    if (strcmp(name, "shadow") == 0) {
        with_fork = count > 2 && strcmp(arguments[2], "fork") == 0;
        shadow();
    } else if (strcmp(name, "syscalls") == 0) {
        syscalls();
    } else {
        fprintf(stderr, "usage: test_epc shadow [fork]|syscalls|tampered|replayed|astray\n");
        return 2;
    }
    return 0;
}
