/* The reclaimer: evicts the oldest pages when frames are short. */
#define _GNU_SOURCE
#include <errno.h>
#include <string.h>

#include "pager_state.h"
#include "uffd.h"

/* How long a limit that was lowered may take to be noticed by a program that has no faults. */
#define LIMIT_CHECK_NS 50000000

/* Put up to two batches of the oldest mapped pages on probation. Lock held, released meanwhile. */
static void age(void) {
    uint32_t chosen[2 * EPC_BATCH], sorted[2 * EPC_BATCH], slots[2 * EPC_BATCH];
    char *to[2 * EPC_BATCH], *from[2 * EPC_BATCH];
    int errors[2 * EPC_BATCH];
    uint32_t mapped = epc.active.count;
    uint32_t wanted = mapped / 4 > EPC_BATCH ? mapped / 4 : EPC_BATCH;
    uint32_t count = 0;
    while (count < 2 * EPC_BATCH && epc.probation.count + count < wanted && epc.active.count > 0 &&
           epc.empty.free > 0) {
        chosen[count] = sorted[count] = epc.active.head;
        slots[count] = slot_take(&epc.empty);
        queue_remove(epc.pages, &epc.active, chosen[count]);
        epc_begin(chosen[count]);
        count++;
    }
    if (count == 0) {
        return;
    }
    pthread_mutex_unlock(&epc.lock);
    epc_sort(sorted, count); /* so that neighbours move at once */
    epc_sort(slots, count);
    for (uint32_t i = 0; i < count; i++) {
        from[i] = epc_page_address(sorted[i]);
        to[i] = epc_slot_address(slots[i]);
    }
    epc_move(to, from, errors, count);
    pthread_mutex_lock(&epc.lock);
    epc.pinned = epc.unmoved = 0;
    for (uint32_t i = 0; i < count; i++) {
        uint32_t page = sorted[i];
        if (errors[i] == 0) {
            epc.pages[page].slot = slots[i];
            epc_settle(page, PAGE_PROBATION);
            continue;
        }
        slot_give(&epc.empty, slots[i]);
        if (errors[i] == ENOENT) { /* the program took the page away by itself */
            epc.allocated--;
            epc_settle(page, PAGE_ABSENT);
        } else if (errors[i] != EBUSY && errors[i] != ENOMEM) {
            epc_die("a page can't be unmapped: the kernel gives an unexpected error");
        } else { /* pinned by the kernel for a transfer, or no memory for its tables: not now */
            epc.pinned += errors[i] == EBUSY;
            epc.unmoved += errors[i] == ENOMEM;
            epc_settle(page, PAGE_MAPPED);
        }
    }
    for (uint32_t i = 0; i < count; i++) { /* in their old order */
        uint8_t state = epc.pages[chosen[i]].state;
        if (state != PAGE_ABSENT) {
            queue_push(epc.pages, state == PAGE_MAPPED ? &epc.active : &epc.probation, chosen[i]);
        }
    }
}

/* A reclaimer, and the time that it has worked for. An eviction takes its charge from the end of the
 * one before, so aging and waiting for the lock are parts of it. */
struct reclaimer {
    struct epc_sealer *sealer;
    uint64_t charged_until; /* evictions so far have been paid for up to here */
    uint64_t last;          /* when the last one ended */
};

/* Take what an eviction is charged; false if it has taken longer already. A batch is unmapped before its
 * first page is encrypted, so an eviction may be as late as that: the next ones catch up. */
static bool charge_eviction(struct reclaimer *self) {
    uint64_t charge = EPC_GET(charge_evict_ns), now = epc_now_ns();
    self->charged_until += charge;
    if (self->charged_until + EPC_BATCH * charge < now) {
        self->charged_until = now;
        return charge == 0;
    }
    epc_spin_until(self->charged_until);
    return true;
}

/* Encrypt the oldest page on probation; its slot. Lock held, released meanwhile. */
static uint32_t evict_one(struct reclaimer *self) {
    uint32_t page = epc.probation.head;
    struct page *entry = &epc.pages[page];
    uint32_t slot = entry->slot;
    queue_remove(epc.pages, &epc.probation, page);
    epc_begin(page);
    entry->version = ++epc.next_version;
    entry->key = (uint8_t)(epc.key_count - 1);
    pthread_mutex_unlock(&epc.lock);

    if (!epc_seal(self->sealer, page, entry->version, (const unsigned char *)epc_slot_address(slot),
                  epc_backing_address(page), entry->tag)) {
        epc_die("libcrypto can't encrypt a page");
    }
    bool in_time = charge_eviction(self);
    uint64_t now = epc_now_ns(), spent = now - self->last;
    self->last = now;

    pthread_mutex_lock(&epc.lock);
    queue_push(epc.pages, &epc.out, page);
    epc_settle(page, PAGE_OUT);
    EPC_ADD(evicted, 1);
    EPC_ADD(evict_ns, spent);
    EPC_ADD(late_evicts, !in_time);
    return slot;
}

/* Give up what the slots hold, neighbours at once. */
static void free_frames(uint32_t *slots, uint32_t count) {
    epc_sort(slots, count);
    for (uint32_t i = 0, run; i < count; i += run) {
        for (run = 1; i + run < count && slots[i + run] == slots[i] + run; run++) {
        }
        epc_discard(epc_slot_address(slots[i]), run * EPC_PAGE);
    }
}

/* Evict up to a batch; false if there is nothing to evict. Lock held, released meanwhile. */
static bool evict_batch(struct reclaimer *self) {
    uint32_t slots[EPC_BATCH], count = 0;
    age();
    while (count < EPC_BATCH && epc.probation.count > 0) {
        slots[count++] = evict_one(self);
    }
    epc.busy++; /* a fork now would count these frames in the child for ever */
    pthread_mutex_unlock(&epc.lock);
    free_frames(slots, count);
    pthread_mutex_lock(&epc.lock);
    epc.busy--;
    pthread_cond_broadcast(&epc.settled);
    for (uint32_t i = 0; i < count; i++) {
        slot_give(&epc.empty, slots[i]);
    }
    epc.allocated -= count;
    epc_note_levels();
    if (count > 0) {
        pthread_cond_broadcast(&epc.freed);
    }
    return count > 0;
}

static struct reclaimer new_reclaimer(void) {
    struct reclaimer self = {.sealer = epc_sealer_new(epc.keys[epc.key_count - 1])};
    if (self.sealer == NULL) {
        epc_die("libcrypto gives no cipher");
    }
    return self;
}

static void begin_work(struct reclaimer *self) { self->charged_until = self->last = epc_now_ns(); }

/* Wait for work, but not for long: the host may have lowered the limit, or the program's last thread have
 * ended. Lock held, released meanwhile. */
static void wait_for_work(void) {
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += LIMIT_CHECK_NS;
    if (until.tv_nsec >= 1000000000) {
        until.tv_nsec -= 1000000000;
        until.tv_sec++;
    }
    if (pthread_cond_timedwait(&epc.work, &epc.lock, &until) == ETIMEDOUT) {
        pthread_mutex_unlock(&epc.lock);
        epc_end_if_alone();
        pthread_mutex_lock(&epc.lock);
    }
}

void *epc_reclaim(void *unused) {
    (void)unused;
    pthread_mutex_lock(&epc.lock);
    struct reclaimer self = new_reclaimer();
    for (;;) {
        while (epc_available() >= EPC_LOW) {
            wait_for_work();
        }
        begin_work(&self);
        while (epc_available() < EPC_HIGH) {
            struct timespec until = epc_patience();
            while (epc.forking) {
                epc_wait(&epc.settled, &until, "a fork took a minute");
            }
            if (!evict_batch(&self)) {
                wait_for_work(); /* nothing to evict: pages are busy or few */
                begin_work(&self);
            }
        }
    }
    return NULL;
}

void epc_evict_all(void) {
    struct reclaimer self = new_reclaimer();
    struct epc_hold before;
    epc_hold(&before);
    begin_work(&self);
    while (evict_batch(&self)) {
    }
    epc_let_go(&before);
    epc_sealer_free(self.sealer);
}
