/* Moving pages while the program uses them and the host looks at which it used. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdatomic.h>

#include "epc_rig.h"
#include "epc/uffd.h"

#define PAGES 64
#define MOVES 200000

static char *here, *there;
static atomic_bool done;

static void *touch(void *unused) {
    (void)unused;
    while (!atomic_load(&done)) {
        for (size_t i = 0; i < PAGES; i++) {
            atomic_fetch_add_explicit((_Atomic char *)(here + i * EPC_PAGE), 1, memory_order_relaxed);
        }
    }
    return NULL;
}

/* What the observer of the hot footprint does, without its pauses. */
static void *forget_touches(void *unused) {
    (void)unused;
    int clear_refs = open("/proc/self/clear_refs", O_WRONLY);
    CHECK(clear_refs >= 0);
    while (!atomic_load(&done)) {
        CHECK(pwrite(clear_refs, "1", 1, 0) == 1);
    }
    close(clear_refs);
    return NULL;
}

/* Promise: a page that has been moved is reported so, also where the kernel had to try twice because
 * its accessed bit changed meanwhile; and who waits for it goes on. A move that were misreported would
 * leave a page nobody knows of, and its program would fault for ever. */
int main(void) {
    char reason[300];
    int uffd = epc_uffd_open(reason, sizeof reason);
    if (uffd < 0) {
        printf("skipped: %s\n", reason);
        return SKIP;
    }
    here = epc_reserve(PAGES * EPC_PAGE);
    there = epc_reserve(PAGES * EPC_PAGE);
    CHECK(here != NULL && there != NULL);
    epc_small_pages(here, PAGES * EPC_PAGE);
    epc_small_pages(there, PAGES * EPC_PAGE);
    CHECK(epc_uffd_register(uffd, here, PAGES * EPC_PAGE));
    CHECK(epc_uffd_register(uffd, there, PAGES * EPC_PAGE));
    static const unsigned char zeros[PAGES * EPC_PAGE];
    CHECK(epc_uffd_copy(uffd, here, zeros, PAGES) == PAGES);
    pthread_t toucher, observer;
    CHECK(pthread_create(&toucher, NULL, touch, NULL) == 0);
    CHECK(pthread_create(&observer, NULL, forget_touches, NULL) == 0);
    for (size_t i = 0; i < MOVES; i++) {
        size_t count = i % 3 == 0 ? 4 : 1, at = i % (PAGES - count + 1) * EPC_PAGE;
        CHECK(epc_uffd_move(uffd, there + at, here + at, count) == count);
        CHECK(epc_uffd_move(uffd, here + at, there + at, count) == count);
    }
    atomic_store(&done, true);
    CHECK(pthread_join(toucher, NULL) == 0 && pthread_join(observer, NULL) == 0);
    return 0;
}
