/* What the pager knows of every page, and its queues. Private to the pager. */
#ifndef LASAGNA_EPC_PAGES_H
#define LASAGNA_EPC_PAGES_H

#include <stdint.h>

#include "seal.h"

#define EPC_NONE UINT32_MAX

/*            fault                 reclaim              drop
 *  ABSENT    -> BUSY -> MAPPED                          .
 *  MAPPED    .                     -> BUSY -> PROBATION -> ABSENT
 *  PROBATION -> MAPPED             -> BUSY -> OUT       -> ABSENT
 *  OUT       -> BUSY -> MAPPED                          -> ABSENT
 *  BUSY      waits                 left alone           waits            */
enum page_state { PAGE_ABSENT, PAGE_MAPPED, PAGE_PROBATION, PAGE_OUT, PAGE_BUSY };

struct page {
    uint64_t version; /* of its ciphertext */
    uint32_t next, previous;
    uint32_t slot; /* on probation: where its frame is */
    uint8_t state;
    uint8_t key; /* which of the process's keys sealed it: after fork there is a new one */
    unsigned char tag[EPC_TAG];
};

/* Oldest first. */
struct page_queue {
    uint32_t head, tail;
    uint32_t count;
};

static inline void queue_init(struct page_queue *queue) {
    queue->head = queue->tail = EPC_NONE;
    queue->count = 0;
}

static inline void queue_push(struct page *pages, struct page_queue *queue, uint32_t page) {
    pages[page].next = EPC_NONE;
    pages[page].previous = queue->tail;
    if (queue->tail == EPC_NONE) {
        queue->head = page;
    } else {
        pages[queue->tail].next = page;
    }
    queue->tail = page;
    queue->count++;
}

static inline void queue_remove(struct page *pages, struct page_queue *queue, uint32_t page) {
    struct page *entry = &pages[page];
    if (entry->previous == EPC_NONE) {
        queue->head = entry->next;
    } else {
        pages[entry->previous].next = entry->next;
    }
    if (entry->next == EPC_NONE) {
        queue->tail = entry->previous;
    } else {
        pages[entry->next].previous = entry->previous;
    }
    queue->count--;
}

/* Slots, in the order in which they came: so neighbours stay neighbours, and move at once. */
struct slot_ring {
    uint32_t *slots;
    uint32_t room, first, count;
};

static inline void ring_push(struct slot_ring *ring, uint32_t slot) {
    uint32_t at = ring->first + ring->count++;
    ring->slots[at < ring->room ? at : at - ring->room] = slot;
}

static inline uint32_t ring_pop(struct slot_ring *ring) {
    uint32_t slot = ring->slots[ring->first];
    ring->first = ring->first + 1 < ring->room ? ring->first + 1 : 0;
    ring->count--;
    return slot;
}

#endif
