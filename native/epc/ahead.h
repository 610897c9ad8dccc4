/* Guessing which pages a program touches next, so that one fault brings several. Pure.
 *
 * A fault costs the emulator two switches of threads, which takes longer than the processor's own
 * paging. But programs repeat themselves: a network reads its weights in the same order for every
 * request. Pages are evicted in the order in which they were loaded, so the page that was evicted next
 * is the best guess of what is touched next, whatever the pattern in space; or the page before it, where
 * a program goes backwards. A guess that came true doubles the number of pages that the next fault
 * brings. */
#ifndef LASAGNA_EPC_AHEAD_H
#define LASAGNA_EPC_AHEAD_H

#include <stdbool.h>
#include <stdint.h>

#define EPC_STREAMS 16u    /* sequences of faults that are told apart */
#define EPC_WINDOW_MAX 32u /* pages that one fault brings at most */

enum epc_direction { EPC_FORWARD, EPC_BACKWARD };

struct epc_streams {
    struct {
        uint32_t expected[2]; /* the page whose fault would continue it, in either direction */
        uint32_t window;      /* pages that its last fault was allowed; 0: entry is free */
        uint64_t used;        /* when, in faults */
    } entries[EPC_STREAMS];
    uint64_t faults;
};

/* The sequence that a fault on this page continues, and in which direction, or one that it begins; and
 * in `window` how many pages, this one included, it may bring. */
static inline uint32_t epc_stream_of(struct epc_streams *all, uint32_t page,
                                     enum epc_direction *direction, uint32_t *window) {
    uint32_t oldest = 0;
    all->faults++;
    for (uint32_t i = 0; i < EPC_STREAMS; i++) {
        if (all->entries[i].window > 0 && (all->entries[i].expected[EPC_FORWARD] == page ||
                                           all->entries[i].expected[EPC_BACKWARD] == page)) {
            uint32_t doubled = 2 * all->entries[i].window;
            *window = doubled < EPC_WINDOW_MAX ? doubled : EPC_WINDOW_MAX;
            *direction =
                all->entries[i].expected[EPC_FORWARD] == page ? EPC_FORWARD : EPC_BACKWARD;
            all->entries[i].window = *window;
            all->entries[i].used = all->faults;
            return i;
        }
        if (all->entries[i].used < all->entries[oldest].used) {
            oldest = i;
        }
    }
    *window = all->entries[oldest].window = 1;
    *direction = EPC_FORWARD;
    all->entries[oldest].used = all->faults;
    return oldest;
}

/* The sequence goes on with one of these pages, if the guess is right: in either direction after its
 * first page, and in the one that it has taken from then on. */
static inline void epc_expect(struct epc_streams *all, uint32_t stream,
                              enum epc_direction direction, const uint32_t pages[2]) {
    bool begun = all->entries[stream].window > 1;
    for (int i = EPC_FORWARD; i <= EPC_BACKWARD; i++) {
        all->entries[stream].expected[i] = begun && i != (int)direction ? UINT32_MAX : pages[i];
    }
}

#endif
