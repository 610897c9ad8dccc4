/* The reclaimer: evicts the oldest pages when frames are short. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "pager_state.h"
#include "uffd.h"

/* Move pages to slots. Neighbours that go to neighbours move at once: unmapping a page interrupts
 * every core that runs the program, and so it is one interrupt for all. */
static void move_out(const uint32_t *pages, const uint32_t *slots, int *errors, uint32_t count) {
    for (uint32_t i = 0, run; i < count; i += run) {
        run = 1;
        while (i + run < count && pages[i + run] == pages[i] + run &&
               slots[i + run] == slots[i] + run) {
            run++;
        }
        size_t moved = epc_uffd_move(epc.uffd, epc_slot_address(slots[i]),
                                     epc_page_address(pages[i]), run);
        for (uint32_t k = 0; k < run; k++) { /* the rest one by one, to know what is wrong */
            errors[i + k] = k < moved ? 0
                                      : epc_move(epc_slot_address(slots[i + k]),
                                                 epc_page_address(pages[i + k]));
        }
    }
}

/* Put up to two batches of the oldest mapped pages on probation. Lock held, released meanwhile. */
static void age(void) {
    uint32_t chosen[2 * EPC_BATCH], slots[2 * EPC_BATCH];
    int errors[2 * EPC_BATCH];
    uint32_t mapped = epc.active.count;
    uint32_t wanted = mapped / 4 > EPC_BATCH ? mapped / 4 : EPC_BATCH;
    uint32_t count = 0;
    while (count < 2 * EPC_BATCH && epc.probation.count + count < wanted && epc.active.count > 0 &&
           epc.empty.count > 0) {
        chosen[count] = epc.active.head;
        slots[count] = ring_pop(&epc.empty);
        queue_remove(epc.pages, &epc.active, chosen[count]);
        epc_begin(chosen[count]);
        count++;
    }
    if (count == 0) {
        return;
    }
    pthread_mutex_unlock(&epc.lock);
    uint64_t begin = epc_now_ns();
    move_out(chosen, slots, errors, count);
    uint64_t spent = epc_now_ns() - begin;
    pthread_mutex_lock(&epc.lock);
    epc.aging_ns += spent;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t page = chosen[i];
        if (errors[i] == 0) {
            epc.pages[page].slot = slots[i];
            queue_push(epc.pages, &epc.probation, page);
            epc_settle(page, PAGE_PROBATION);
            continue;
        }
        ring_push(&epc.empty, slots[i]);
        if (errors[i] == ENOENT) { /* the program took the page away by itself */
            epc.allocated--;
            epc_settle(page, PAGE_ABSENT);
        } else { /* pinned by the kernel, for a transfer: not now */
            queue_push(epc.pages, &epc.active, page);
            epc_settle(page, PAGE_MAPPED);
        }
    }
}

/* Encrypt the oldest page on probation and free its frame. Lock held, released meanwhile. */
static void evict_one(struct epc_sealer *sealer) {
    uint32_t page = epc.probation.head;
    struct page *entry = &epc.pages[page];
    queue_remove(epc.pages, &epc.probation, page);
    epc_begin(page);
    entry->version = ++epc.next_version;
    entry->key = (uint8_t)(epc.key_count - 1);
    /* Unmapping is a part of an eviction. It was done for many pages at once: each pays its share,
     * as far as that is known. */
    uint64_t share = epc.aging_ns / EPC_BATCH;
    epc.aging_ns -= share;
    pthread_mutex_unlock(&epc.lock);

    uint64_t start = epc_now_ns() - share;
    if (!epc_seal(sealer, page, entry->version,
                  (const unsigned char *)epc_slot_address(entry->slot), epc_backing_address(page),
                  entry->tag)) {
        epc_die("libcrypto can't encrypt a page");
    }
    uint64_t charge = epc.costs.evict_ns;
    bool late = charge > 0 && !epc_spin_until(start + charge);
    uint64_t spent = epc_now_ns() - start;

    pthread_mutex_lock(&epc.lock);
    if (epc.allocated > epc_limit()) { /* the limit was lowered */
        epc_discard(epc_slot_address(entry->slot), EPC_PAGE);
        ring_push(&epc.empty, entry->slot);
        epc.allocated--;
    } else {
        ring_push(&epc.frames, entry->slot);
    }
    epc_settle(page, PAGE_OUT);
    EPC_ADD(evicted, 1);
    EPC_ADD(evicted_pages, 1);
    EPC_ADD(evict_ns, spent);
    EPC_ADD(late_evicts, late);
    pthread_cond_broadcast(&epc.freed);
}

static bool evict_batch(struct epc_sealer *sealer) {
    age();
    uint32_t count = 0;
    while (count < EPC_BATCH && epc.probation.count > 0) {
        evict_one(sealer);
        count++;
    }
    return count > 0;
}

void *epc_reclaim(void *unused) {
    (void)unused;
    pthread_mutex_lock(&epc.lock);
    struct epc_sealer *sealer = epc_sealer_new(epc.keys[epc.key_count - 1]);
    if (sealer == NULL) {
        epc_die("libcrypto gives no cipher");
    }
    for (;;) {
        while (epc_available() >= EPC_LOW) {
            pthread_cond_wait(&epc.work, &epc.lock);
        }
        while (epc_available() < EPC_HIGH) {
            if (!evict_batch(sealer)) {
                /* Nothing to evict: pages are busy or few. A fault that ends wakes us. */
                pthread_cond_wait(&epc.work, &epc.lock);
            }
        }
    }
    return NULL;
}

void epc_evict_all(void) {
    struct epc_sealer *sealer = epc_sealer_new(epc.keys[epc.key_count - 1]);
    if (sealer == NULL) {
        epc_die("libcrypto gives no cipher");
    }
    pthread_mutex_lock(&epc.lock);
    while (evict_batch(sealer)) {
    }
    pthread_mutex_unlock(&epc.lock);
    epc_sealer_free(sealer);
}
