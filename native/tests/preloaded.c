/* A program that knows nothing of the emulator, which LD_PRELOAD brings in:
 *   preloaded shadow|cancelled|locked|ended|descriptors */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#define CHECK(what)                                                              \
    do {                                                                         \
        if (!(what)) {                                                           \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #what); \
            _exit(1);                                                            \
        }                                                                        \
    } while (0)

#define KIB ((size_t)1024)
#define PIECES 24
#define STEPS 4000

static uint64_t next_random(void) {
    static uint64_t state = 88172645463325252u;
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

/* Memory of any size, in the region or not, and what it should hold. */
struct piece {
    unsigned char *memory, *shadow;
    size_t bytes;
    bool mapped; /* by mmap */
};

static size_t random_size(void) {
    static const size_t most[] = {200, 100 * KIB, 600 * KIB};
    return 1 + next_random() % most[next_random() % 3];
}

/* The shadow lies where the emulator never is: not in the heap. */
static unsigned char *new_shadow(size_t bytes) {
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    CHECK(memory != MAP_FAILED);
    return memory;
}

static void check(const struct piece *piece) {
    CHECK(memcmp(piece->memory, piece->shadow, piece->bytes) == 0);
}

static void write_some(struct piece *piece) {
    size_t at = next_random() % piece->bytes, length = next_random() % (40 * KIB);
    int value = (int)(next_random() % 256);
    length = length < piece->bytes - at ? length : piece->bytes - at;
    memset(piece->memory + at, value, length);
    memset(piece->shadow + at, value, length);
}

/* From every function that gives memory; what it holds is known from then on. */
static void make(struct piece *piece) {
    size_t alignment = (size_t)16 << next_random() % 14; /* up to 128 KiB */
    uint64_t how = next_random() % 6;
    bool zeroed = how == 1 || how == 5;
    void *memory = NULL;
    piece->bytes = random_size();
    piece->mapped = how == 5;
    switch (how) {
    case 0: memory = malloc(piece->bytes); break;
    case 1: memory = calloc(piece->bytes, 1); break;
    case 2: CHECK(posix_memalign(&memory, alignment, piece->bytes) == 0); break;
    case 3: memory = aligned_alloc(alignment, piece->bytes); break;
    case 4: memory = realloc(NULL, piece->bytes); break;
    default:
        memory = mmap(NULL, piece->bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(memory != MAP_FAILED);
    }
    CHECK(memory != NULL);
    CHECK((how != 2 && how != 3) || (uintptr_t)memory % alignment == 0);
    CHECK(piece->mapped || malloc_usable_size(memory) >= piece->bytes);
    piece->memory = memory;
    piece->shadow = new_shadow(piece->bytes);
    if (!zeroed) {
        memset(piece->memory, 0, piece->bytes);
    }
}

static void give_back(struct piece *piece) {
    check(piece);
    if (piece->mapped) {
        CHECK(munmap(piece->memory, piece->bytes) == 0);
    } else {
        free(piece->memory);
    }
    CHECK(munmap(piece->shadow, piece->bytes) == 0);
}

static void resize(struct piece *piece) {
    size_t bytes = random_size(), common = bytes < piece->bytes ? bytes : piece->bytes;
    unsigned char *shadow = new_shadow(bytes);
    void *memory = piece->mapped ? mremap(piece->memory, piece->bytes, bytes, MREMAP_MAYMOVE)
                                 : realloc(piece->memory, bytes);
    CHECK(memory != NULL && memory != MAP_FAILED);
    memcpy(shadow, piece->shadow, common);
    CHECK(munmap(piece->shadow, piece->bytes) == 0);
    *piece = (struct piece){memory, shadow, bytes, piece->mapped};
    if (!piece->mapped) {
        memset(piece->memory + common, 0, bytes - common);
    } else if (bytes > common) { /* the rest of a page that was mapped already is the program's */
        size_t page_end = (common + 4095) / 4096 * 4096;
        memset(piece->memory + common, 0, (page_end < bytes ? page_end : bytes) - common);
    }
    check(piece);
}

/* Promise: every function of the malloc family, mmap, mremap and munmap do as they do without the
 * emulator, with several times more memory than may be resident. */
static void shadow(void) {
    static struct piece pieces[PIECES];
    for (int i = 0; i < PIECES; i++) {
        make(&pieces[i]);
    }
    for (int step = 0; step < STEPS; step++) {
        struct piece *piece = &pieces[next_random() % PIECES];
        uint64_t what = next_random() % 100;
        if (what < 50) {
            write_some(piece);
        } else if (what < 80) {
            check(piece);
        } else if (what < 90) {
            resize(piece);
        } else {
            give_back(piece);
            make(piece);
        }
    }
    for (int i = 0; i < PIECES; i++) {
        give_back(&pieces[i]);
    }
    volatile size_t many = SIZE_MAX / 2; /* the compiler warns of what it knows */
    errno = 0;
    CHECK(reallocarray(NULL, many, 4) == NULL && errno == ENOMEM);
    CHECK(calloc(many, 4) == NULL);
}

static int ends[2];

static void *wait_in_read(void *unused) {
    char byte;
    (void)unused;
    return (void *)(intptr_t)read(ends[0], &byte, 1);
}

static void *wait_in_recv(void *unused) {
    char byte;
    (void)unused;
    return (void *)(intptr_t)recv(ends[0], &byte, 1, 0);
}

/* Promise: a thread that waits for data can be cancelled. */
static void cancelled(void) {
    void *(*const waits[])(void *) = {wait_in_read, wait_in_recv};
    CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
    alarm(20);
    for (int i = 0; i < 4; i++) {
        pthread_t thread;
        void *result;
        CHECK(pthread_create(&thread, NULL, waits[i / 2], NULL) == 0);
        usleep(i % 2 == 0 ? 50000 : 0); /* it waits already, or not yet */
        CHECK(pthread_cancel(thread) == 0);
        CHECK(pthread_join(thread, &result) == 0);
        CHECK(result == PTHREAD_CANCELED);
    }
}

/* Promise: a program that locks its memory runs, and what it locks is evicted all the same. */
static void locked(void) {
    enum { PAGES = 4 * 512 };
    char *memory = malloc(PAGES * 4096);
    CHECK(memory != NULL && mlockall(MCL_CURRENT | MCL_FUTURE) == 0);
    CHECK(mlock(memory + 7 * 4096, 100 * 4096) == 0 && mlock2(memory, 4096, MLOCK_ONFAULT) == 0);
    for (int round = 0; round < 3; round++) {
        for (size_t i = 0; i < PAGES; i++) {
            CHECK(round == 0 || memory[i * 4096] == (char)i);
            memory[i * 4096] = (char)i;
        }
        CHECK(munlock(memory + 50 * 4096, 4096) == 0);
    }
    CHECK(munlockall() == 0);
    free(memory);
    static char small[4096]; /* not in the region: locked as ever */
    CHECK(mlock(small, sizeof small) == 0 && munlock(small, sizeof small) == 0);
    CHECK(mlock((void *)4096, 4096) != 0 && errno == ENOMEM);
}

static void *outlive_main(void *unused) {
    usleep(200000);
    return unused;
}

static void *wait_for_ever(void *unused) {
    pause();
    return unused;
}

static void be_slow_to_end(void) { pause(); }

/* The status of a child whose main thread ends while this one runs. */
static int status_after_main(void *(*other)(void *), void (*at_exit)(void), int number) {
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        pthread_t thread;
        CHECK(other == NULL || pthread_create(&thread, NULL, other, NULL) == 0);
        CHECK(at_exit == NULL || atexit(at_exit) == 0);
        alarm(20);
        pthread_exit(NULL);
    }
    if (number != 0) {
        usleep(500000);
        CHECK(kill(child, number) == 0);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child);
    return status;
}

/* Promise: a process ends with the last thread of its own, and by a signal before. */
static void ended(void) {
    CHECK(status_after_main(NULL, NULL, 0) == 0);
    CHECK(status_after_main(outlive_main, NULL, 0) == 0);
    CHECK(status_after_main(wait_for_ever, NULL, SIGTERM) == SIGTERM);
    CHECK(status_after_main(NULL, be_slow_to_end, SIGTERM) == SIGTERM);
}

/* Read and write more than may be resident. */
static void use_memory(void) {
    enum { PAGES = 3 * 512 };
    char *memory = malloc(PAGES * 4096);
    CHECK(memory != NULL);
    for (int round = 0; round < 2; round++) {
        for (size_t i = 0; i < PAGES; i++) {
            CHECK(round == 0 || memory[i * 4096] == (char)i);
            memory[i * 4096] = (char)i;
        }
    }
    free(memory);
}

/* Promise: a program has the descriptors that it would have, and may close and replace all of them. */
static void descriptors(void) {
    closefrom(3); /* what the test was started with */
    for (int i = 3; i < 2000; i++) {
        CHECK(close(i) == -1 && errno == EBADF);
        CHECK(dup2(i, 3) == -1 && errno == EBADF);
    }
    use_memory();
    int replaced = 0;
    for (int i = 3; i < 1024; i++) { /* all but the one that is the emulator's */
        replaced += (i % 2 == 0 ? dup2(2, i) : dup3(2, i, O_CLOEXEC)) == i;
    }
    CHECK(replaced == 1020);
    use_memory();
    CHECK(close_range(3, 1000, 0) == 0 && fcntl(1000, F_GETFD) == -1 && fcntl(1001, F_GETFD) != -1);
    CHECK(close_range(5, 4, 0) == -1 && errno == EINVAL);
    CHECK(close_range(1000, ~0u, 0) == 0 && fcntl(1001, F_GETFD) == -1);
    closefrom(3);
    use_memory();
    int status;
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) { /* it has a descriptor of its own */
        closefrom(3);
        CHECK(dup2(2, 3) == 3);
        use_memory();
        _exit(0);
    }
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    CHECK(open("/dev/null", O_RDONLY) == 3);
}

int main(int count, char **arguments) {
    const char *name = count > 1 ? arguments[1] : "";
    static const struct {
        const char *name;
        void (*run)(void);
    } tests[] = {{"shadow", shadow}, {"cancelled", cancelled}, {"locked", locked}, {"ended", ended}, {"descriptors", descriptors}};
    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        if (strcmp(name, tests[i].name) == 0) {
            tests[i].run();
            return 0;
        }
    }
    fprintf(stderr, "usage: preloaded shadow|cancelled|locked|ended|descriptors\n");
    return 2;
}
