/* Resolving faults: the thread that brings pages into memory. */
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "pager_state.h"
#include "region.h"
#include "uffd.h"

/* Pages of a new allocation that its first touch brings: the smallest allocation here. */
#define EPC_FIRST_TOUCH (EPC_GRANULE / EPC_PAGE)
/* A batch grows by so many pages at once, for the sake of neighbours among them. */
#define AT_ONCE 8u
/* Threads may fault on a page that is being mapped, but not so often in a row. */
#define TOO_OFTEN 100000u
/* Overruns beyond this are not made good later: charges should be right over milliseconds. */
#define DEBT_MAX_NS UINT64_C(20000000)

static uint64_t latency_ns(void) {
    return EPC_GET(own_latency_ns);
}

/* The entry of a thread, or of those for which there is none. */
static struct epc_thread_stats *entry_of(uint32_t tid) {
    enum { OWN = EPC_STATS_THREADS - 1 };
    static uint32_t last;
    struct epc_thread_stats *threads = epc.stats->threads;
    for (uint32_t tried = 0; tried < OWN; tried++) {
        uint32_t place = (last + tried) % OWN;
        uint64_t owner = atomic_load_explicit(&threads[place].tid, memory_order_relaxed);
        if (owner == 0 || owner == tid) {
            last = place;
            atomic_store_explicit(&threads[place].tid, tid, memory_order_relaxed);
            return &threads[place];
        }
    }
    atomic_store_explicit(&threads[OWN].tid, EPC_STATS_OTHERS, memory_order_relaxed);
    return &threads[OWN];
}

static void note_fault(uint32_t tid, uint32_t pages, uint64_t spent) {
    struct epc_thread_stats *entry = entry_of(tid);
    atomic_fetch_add_explicit(&entry->faults, pages, memory_order_relaxed);
    atomic_fetch_add_explicit(&entry->fault_ns, spent, memory_order_relaxed);
}

static void add_debt(uint64_t overrun) {
    uint64_t room = DEBT_MAX_NS - epc.debt_ns;
    epc.debt_ns += overrun < room ? overrun : room;
    EPC_ADD(unpaid_ns, overrun < room ? 0 : overrun - room);
}

/* Give a page back that was on probation. Lock held, released meanwhile. */
static void second_chance(uint32_t number) {
    uint32_t slot = epc.pages[number].slot;
    queue_remove(epc.pages, &epc.probation, number);
    epc_begin(number);
    pthread_mutex_unlock(&epc.lock);
    char *to = epc_page_address(number), *from = epc_slot_address(slot);
    int error;
    epc_move(&to, &from, &error, 1);
    if (error != 0) {
        epc_die("a page on probation can't be mapped again");
    }
    pthread_mutex_lock(&epc.lock);
    slot_give(&epc.empty, slot);
    queue_push(epc.pages, &epc.active, number);
    epc_settle(number, PAGE_MAPPED);
    EPC_ADD(second_chances, 1);
    add_debt(latency_ns());
}

/* Spin until faults on so many pages, of which the first was read at `start`, have taken what they are
 * charged, mapping included. What took longer is deducted from later charges, so that the sum is
 * right. */
static void charge_faults(uint64_t start, uint64_t charge, uint32_t pages, uint64_t map_ns) {
    uint64_t now = epc_now_ns(), owed = charge * pages;
    uint64_t taken = now - start + latency_ns() + map_ns * (pages - 1);
    if (charge == 0) {
        return;
    }
    if (taken >= owed) {
        EPC_ADD(late_loads, pages);
        add_debt(taken - owed);
        return;
    }
    uint64_t rest = owed - taken, repaid = rest < epc.debt_ns ? rest : epc.debt_ns;
    epc.debt_ns -= repaid;
    epc_spin_until(now + rest - repaid);
}

/* Pages that one fault brings: the one that was touched, and those that are likely to be touched next. */
struct batch {
    bool sealed;     /* they were evicted, or else never touched */
    enum epc_direction direction;
    uint32_t next[2]; /* what may come as well, in either direction, or EPC_NONE */
    uint32_t count, window;
    uint32_t filled; /* of so many the content is there */
    uint32_t pages[EPC_WINDOW_MAX];  /* in the order in which they are likely to be touched */
    uint32_t sorted[EPC_WINDOW_MAX]; /* by address, so that neighbours are mapped at once */
};

/* Take a page into the batch and say which ones may follow: of evicted ones those that were evicted
 * after and before it, of new ones its neighbours in the same allocation. There must be a frame. Lock held. */
static void add(struct batch *batch, uint32_t number) {
    if (batch->sealed) {
        batch->next[EPC_FORWARD] = epc.pages[number].next;
        batch->next[EPC_BACKWARD] = epc.pages[number].previous;
        queue_remove(epc.pages, &epc.out, number);
    } else {
        batch->next[EPC_FORWARD] = number + 1 < epc_allocation_end(number) ? number + 1 : EPC_NONE;
        batch->next[EPC_BACKWARD] = number > epc_allocation_start(number) ? number - 1 : EPC_NONE;
    }
    epc_begin(number);
    epc.allocated++;
    batch->pages[batch->count] = batch->sorted[batch->count] = number;
    batch->count++;
}

/* Take as many more pages as the window allows and there are frames. Lock held. */
static void extend(struct batch *batch) {
    uint8_t wanted = batch->sealed ? PAGE_OUT : PAGE_ABSENT;
    while (batch->count < batch->window && epc_available() > 0) {
        uint32_t next = batch->next[batch->direction];
        if (next == EPC_NONE || epc.pages[next].state != wanted) {
            batch->window = batch->count;
            break;
        }
        add(batch, next);
    }
    epc_sort(batch->sorted + batch->filled, batch->count - batch->filled);
    if (epc_available() < EPC_LOW) {
        pthread_cond_signal(&epc.work);
    }
    epc_note_levels();
}

static void fill(struct batch *batch, struct epc_sealer *const *sealers) {
    for (; batch->filled < batch->count; batch->filled++) {
        uint32_t number = batch->sorted[batch->filled];
        const struct page *page = &epc.pages[number];
        if (!batch->sealed) {
            memset(epc.contents[batch->filled], 0, EPC_PAGE);
        } else if (!epc_open(sealers[page->key], number, page->version,
                             epc_backing_address(number), page->tag, epc.contents[batch->filled])) {
            epc_die("a page does not open: its backing store was modified");
        }
    }
}

/* Give neighbours to the program. Where the kernel has split the region, as it does when the program
 * treats a part of it in a way that we don't know of, they may lie in two mappings: then one by one. */
static void map_run(uint32_t number, const unsigned char (*contents)[EPC_PAGE], uint32_t run) {
    size_t done = epc_uffd_copy(epc.uffd, epc_page_address(number), contents, run);
    for (; done < run; done++) {
        if (epc_uffd_copy(epc.uffd, epc_page_address(number + (uint32_t)done), contents[done],
                          1) == 0) {
            epc_die("a page can't be mapped");
        }
    }
}

/* Give the pages to the program. */
static void map(const struct batch *batch) {
    for (uint32_t i = 0, run; i < batch->count; i += run) {
        uint32_t number = batch->sorted[i];
        for (run = 1; i + run < batch->count && batch->sorted[i + run] == number + run; run++) {
        }
        map_run(number, &epc.contents[i], run);
    }
}

/* Bring a page that has no frame into memory, and others ahead; there must be a free frame. While a
 * charge runs, more frames become free and the batch grows, up to the window. Lock held, released
 * meanwhile. */
static void load(uint32_t first, struct epc_sealer *const *sealers, uint64_t start, uint32_t tid) {
    static struct epc_streams streams;
    static uint64_t map_ns; /* what mapping a page of a batch takes, on average of late */
    struct batch batch = {.sealed = epc.pages[first].state == PAGE_OUT};
    uint64_t charge = batch.sealed ? EPC_GET(charge_load_ns) : EPC_GET(charge_add_ns);
    uint32_t stream = epc_stream_of(&streams, first, &batch.direction, &batch.window);
    if (!batch.sealed && first == epc_allocation_start(first) && batch.window < EPC_FIRST_TOUCH) {
        batch.window = EPC_FIRST_TOUCH; /* a new buffer is filled from its start */
    }
    if (epc.calibrating) {
        batch.window = 1;
    }
    add(&batch, first);
    extend(&batch);
    pthread_mutex_unlock(&epc.lock);
    fill(&batch, sealers);
    while (batch.count < batch.window && epc_now_ns() < start + charge * batch.count) {
        uint32_t rest = batch.window - batch.count;
        if (EPC_GET(free_pages) < (rest < AT_ONCE ? rest : AT_ONCE)) {
            continue;
        }
        pthread_mutex_lock(&epc.lock);
        extend(&batch);
        pthread_mutex_unlock(&epc.lock);
        fill(&batch, sealers);
    }
    charge_faults(start, charge, batch.count, map_ns);
    uint64_t ready = epc_now_ns();
    map(&batch);
    if (batch.count > 1) { /* mapping one page is part of the latency that was measured */
        map_ns = (7 * map_ns + (epc_now_ns() - ready) / batch.count) / 8;
    }

    pthread_mutex_lock(&epc.lock);
    epc_expect(&streams, stream, batch.direction, batch.next);
    for (uint32_t i = 0; i < batch.count; i++) {
        queue_push(epc.pages, &epc.active, batch.pages[i]);
        epc_settle(batch.pages[i], PAGE_MAPPED);
    }
    if (batch.sealed) {
        EPC_ADD(loaded, batch.count);
    } else {
        EPC_ADD(added, batch.count);
    }
    EPC_ADD(ahead, batch.count - 1);
    uint64_t spent = ready - start + latency_ns() + map_ns * (batch.count - 1);
    EPC_ADD(load_ns, spent);
    note_fault(tid, batch.count, spent);
    epc_note_levels();
}

/* No page was evicted for a minute: say what the reclaimer was left with. Lock held. */
static void die_without_frame(void) {
    char what[256];
    snprintf(what, sizeof(what),
             "no page could be evicted for a minute: of %u frames %u are mapped and %u on probation; "
             "of the oldest %u were pinned, and for %u the kernel had no memory",
             epc_limit(), epc.active.count, epc.probation.count, epc.pinned, epc.unmoved);
    epc_die(what);
}

/* Wait until the page is at rest, and a frame is free if it needs one; its state then. Waiting is not
 * charged for: a real enclave's fault waits for the reclaimer as well. Lock held, released meanwhile. */
static enum page_state wait_for(uint32_t number) {
    struct timespec until = epc_patience();
    uint64_t since = 0; /* when it began to wait for a frame */
    for (;;) {
        enum page_state state = epc.pages[number].state;
        if (state == PAGE_BUSY) {
            epc_wait(&epc.settled, &until, "a page was busy for a minute");
        } else if ((state == PAGE_ABSENT || state == PAGE_OUT) && epc_available() == 0) {
            since = since == 0 ? epc_now_ns() : since;
            pthread_cond_signal(&epc.work);
            if (pthread_cond_timedwait(&epc.freed, &epc.lock, &until) == ETIMEDOUT) {
                die_without_frame();
            }
        } else {
            if (since != 0) {
                EPC_ADD(waits, 1);
                EPC_ADD(wait_ns, epc_now_ns() - since);
            }
            return state;
        }
    }
}

static void resolve(const struct epc_fault *fault, struct epc_sealer *const *sealers) {
    static uint32_t last = EPC_NONE, again;
    if (!epc_contains((const void *)fault->address)) { /* frames are watched as well */
        epc_die("the program touched memory that it was never given: the emulator's own");
    }
    uint32_t number = (uint32_t)((fault->address - (uintptr_t)epc.region) / EPC_PAGE);
    pthread_mutex_lock(&epc.lock);
    switch (wait_for(number)) {
    case PAGE_PROBATION:
        second_chance(number);
        break;
    case PAGE_ABSENT:
    case PAGE_OUT:
        load(number, sealers, epc_now_ns(), fault->tid);
        break;
    default: /* another thread's fault brought it */
        again = number == last ? again + 1 : 0;
        if (again == TOO_OFTEN) {
            epc_die("a page that is mapped faults again and again");
        }
        epc_uffd_wake(epc.uffd, (void *)fault->address);
    }
    last = number;
    pthread_mutex_unlock(&epc.lock);
}

/* Faults of one enclave are serial, as in the driver, where they hold the enclave's lock. */
void *epc_handle_faults(void *unused) {
    (void)unused;
    struct epc_sealer *sealers[EPC_KEYS];
    for (uint8_t i = 0; i < epc.key_count; i++) {
        sealers[i] = epc_sealer_new(epc.keys[i]);
        if (sealers[i] == NULL) {
            epc_die("libcrypto gives no cipher");
        }
    }
    for (;;) {
        struct epc_fault faults[EPC_BATCH];
        size_t count = epc_uffd_read(epc.uffd, faults, EPC_BATCH);
        for (size_t i = 0; i < count; i++) {
            resolve(&faults[i], sealers);
        }
    }
    return NULL;
}
