/* The pager's state, and what its parts call of each other. Private to the pager. */
#ifndef LASAGNA_EPC_PAGER_STATE_H
#define LASAGNA_EPC_PAGER_STATE_H

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <time.h>

#include "ahead.h"
#include "pager.h"
#include "pages.h"
#include "seal.h"

/* As in the driver: SGX_NR_TO_SCAN, SGX_NR_LOW_PAGES, SGX_NR_HIGH_PAGES. */
#define EPC_BATCH 16u
#define EPC_LOW 32u
#define EPC_HIGH 64u
/* Processes that may descend from each other by fork alone: each has a key of its own. */
#define EPC_KEYS 16u

struct pager {
    /* Set at the start. */
    char *region;
    size_t region_pages;
    char *slots; /* pages on probation lie here */
    uint32_t slot_count;
    unsigned char *backing; /* ciphertext of page i at i * EPC_PAGE */
    unsigned char (*contents)[EPC_PAGE]; /* of pages that a fault brings, before they are mapped */
    struct page *pages;
    struct epc_stats *stats;
    int uffd;
    unsigned char keys[EPC_KEYS][EPC_KEY];
    uint8_t key_count; /* the last one seals */

    /* Everything below is guarded by this lock. */
    pthread_mutex_t lock;
    pthread_cond_t work;    /* for the reclaimer: frames are short */
    pthread_cond_t freed;   /* for faults: a frame is free */
    pthread_cond_t settled; /* a page is no longer busy */
    struct page_queue active, probation;
    struct page_queue out; /* in the order of their eviction: what to guess from */
    struct slot_set empty;
    uint32_t allocated; /* frames in use: mapped, on probation, promised to a fault */
    uint32_t busy;      /* pages in transition, and batches of frames that are given up */
    uint32_t pinned, unmoved; /* pages that the last attempt to age left: pinned, and for want of memory */
    bool calibrating; /* faults bring one page each */
    bool forking;     /* the reclaimer pauses */
    uint64_t next_version;
    uint64_t debt_ns;  /* what faults took above their charge, to be made good by later ones */
};

extern struct pager epc;

#define EPC_ADD(field, amount) \
    atomic_fetch_add_explicit(&epc.stats->field, (uint64_t)(amount), memory_order_relaxed)
#define EPC_SET(field, value) \
    atomic_store_explicit(&epc.stats->field, (uint64_t)(value), memory_order_relaxed)

#define EPC_GET(field) atomic_load_explicit(&epc.stats->field, memory_order_relaxed)

/* Pages that may be resident now; the host may change it. */
uint32_t epc_limit(void);
/* Frames that can be given out. Lock held. */
uint32_t epc_available(void);

static inline char *epc_page_address(uint32_t page) {
    return epc.region + (size_t)page * EPC_PAGE;
}
static inline char *epc_slot_address(uint32_t slot) {
    return epc.slots + (size_t)slot * EPC_PAGE;
}
static inline unsigned char *epc_backing_address(uint32_t page) {
    return epc.backing + (size_t)page * EPC_PAGE;
}

/* Mark a page as in transition, and as settled. Lock held. */
void epc_begin(uint32_t page);
void epc_settle(uint32_t page, enum page_state state);

/* Move pages, each with 0 or an error. Neighbours that go to neighbours move at once: unmapping
 * interrupts every core that runs the program, and so it is one interrupt for all. Where fork has left
 * a frame shared, it is copied first. */
void epc_move(char *const *to, char *const *from, int *errors, uint32_t count);

/* Publish how many pages are resident. Lock held. */
void epc_note_levels(void);

/* The thread that resolves faults. */
void *epc_handle_faults(void *unused);

/* The reclaimer thread. */
void *epc_reclaim(void *unused);

/* End the process if no thread of the program is left. For the reclaimer, now and then; without the lock. */
void epc_end_if_alone(void);

/* Note memory of the emulator in the statistics. */
void epc_note_own(const void *start, size_t bytes);

/* Spin until this time, if it has not passed already. */
void epc_spin_until(uint64_t time_ns);

/* A minute from now: no wait is longer. */
struct timespec epc_patience(void);

/* Wait, and end the process if that time comes. Lock held. */
void epc_wait(pthread_cond_t *condition, const struct timespec *until, const char *what);

/* The lock on a thread of the program's: no signal handler may run while it is held, since a handler could
 * touch a page that nobody can bring then; and no cancellation, which would leave it locked. */
struct epc_hold {
    sigset_t signals; /* the thread's mask before */
    int cancelling;
};
void epc_hold(struct epc_hold *before);
void epc_let_go(const struct epc_hold *before);
/* Its second half: when there is no lock to unlock. */
void epc_restore(const struct epc_hold *before);

/* End the process if this thread's stack is in the region: it could fault while it holds the lock. */
void epc_refuse_stack(void);

#endif
