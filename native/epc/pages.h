/* What the pager knows of every page, and its queues. Private to the pager. */
#ifndef LASAGNA_EPC_PAGES_H
#define LASAGNA_EPC_PAGES_H

#include <stdint.h>

#include "seal.h"

#define EPC_NONE UINT32_MAX

/*            fault                 reclaim              drop
 *  ABSENT    -> BUSY -> MAPPED                          .
 *  MAPPED    .                     -> BUSY -> PROBATION -> ABSENT
 *  PROBATION -> BUSY -> MAPPED     -> BUSY -> OUT       -> ABSENT
 *  OUT       -> BUSY -> MAPPED                          -> ABSENT
 *  BUSY      waits                 left alone           waits            */
enum page_state { PAGE_ABSENT, PAGE_MAPPED, PAGE_PROBATION, PAGE_OUT, PAGE_BUSY };

struct page {
    uint64_t version; /* of its ciphertext */
    uint32_t next, previous;
    uint32_t slot; /* on probation: where its frame is */
    uint8_t state;
    uint8_t unmapped; /* munmap took it: guarded by the allocator's lock, and its own */
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

/* Ascending; for the few pages of a batch. */
static inline void epc_sort(uint32_t *values, uint32_t count) {
    for (uint32_t i = 1; i < count; i++) {
        uint32_t value = values[i], place = i;
        for (; place > 0 && values[place - 1] > value; place--) {
            values[place] = values[place - 1];
        }
        values[place] = value;
    }
}

/* Slots that hold no page. They are taken in the order of their addresses, round and round: so those
 * that are taken together are neighbours. */
struct slot_set {
    uint8_t *taken;
    uint32_t room, cursor, free;
};

/* There must be a free one. */
static inline uint32_t slot_take(struct slot_set *slots) {
    while (slots->taken[slots->cursor]) {
        slots->cursor = slots->cursor + 1 < slots->room ? slots->cursor + 1 : 0;
    }
    slots->taken[slots->cursor] = 1;
    slots->free--;
    return slots->cursor;
}

static inline void slot_give(struct slot_set *slots, uint32_t slot) {
    slots->taken[slot] = 0;
    slots->free++;
}

#endif
