#define _GNU_SOURCE
#include "region.h"

#include <pthread.h>
#include <stdint.h>
#include <string.h>

#include "pager_state.h"
#include "uffd.h"

#define CLASSES 160
#define PAGES_OF_GRANULE (EPC_GRANULE / EPC_PAGE)

/* The first granule of a piece describes it. */
struct piece {
    uint32_t granules;  /* of its size class */
    uint32_t next_free; /* in the list of its class */
    _Atomic uint32_t asked; /* pages that were asked for */
    uint32_t skipped;   /* pages before the first of them, for alignment */
    uint32_t unmapped;  /* of those that were asked for: pages that munmap took */
    bool used;          /* it may hold what somebody left there */
    uint8_t class_of;
};

static struct {
    pthread_mutex_t lock;
    struct piece *pieces;
    _Atomic uint32_t *first; /* of each granule: where its piece begins */
    uint32_t granules, used;
    uint32_t free_list[CLASSES];
} region = {.lock = PTHREAD_MUTEX_INITIALIZER};

bool epc_region_start(void) {
    region.granules = (uint32_t)(epc_region_pages() / PAGES_OF_GRANULE);
    region.pieces = epc_reserve(region.granules * sizeof *region.pieces);
    region.first = epc_reserve(region.granules * sizeof *region.first);
    epc_note_own(region.pieces, region.granules * sizeof *region.pieces);
    epc_note_own(region.first, region.granules * sizeof *region.first);
    memset(region.free_list, 0xff, sizeof region.free_list); /* EPC_NONE */
    return region.pieces != NULL && region.first != NULL;
}

/* Sizes 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, ...: the class of a number of granules, and the
 * class's own size. */
static uint8_t class_of(uint32_t granules, uint32_t *size) {
    if (granules <= 8) {
        *size = granules;
        return (uint8_t)(granules - 1);
    }
    uint32_t shift = 29u - (uint32_t)__builtin_clz(granules - 1);
    uint32_t quarters = (granules - 1) >> shift; /* 4 to 7 */
    *size = (quarters + 1) << shift;
    return (uint8_t)(8 + (shift - 1) * 4 + (quarters - 4));
}

static uint32_t granule_of(const void *address) {
    return (uint32_t)(((uintptr_t)address - (uintptr_t)epc_region()) / EPC_GRANULE);
}

static uint32_t piece_of(uint32_t granule) {
    return atomic_load_explicit(&region.first[granule], memory_order_relaxed);
}

static char *address_of(uint32_t granule) {
    return epc_region() + (size_t)granule * EPC_GRANULE;
}

void *epc_allocate(size_t bytes, size_t alignment, bool zeroed) {
    size_t extra = alignment > EPC_GRANULE ? alignment : 0;
    size_t wanted = (bytes + extra + EPC_GRANULE - 1) / EPC_GRANULE;
    if (bytes + extra < bytes || wanted == 0 || wanted > region.granules) {
        return NULL;
    }
    uint32_t size;
    uint8_t class = class_of((uint32_t)wanted, &size);
    pthread_mutex_lock(&region.lock);
    uint32_t piece = region.free_list[class];
    if (piece != EPC_NONE) {
        region.free_list[class] = region.pieces[piece].next_free;
    } else if (size <= region.granules - region.used) {
        piece = region.used;
        region.used += size;
        region.pieces[piece].granules = size;
        region.pieces[piece].class_of = class;
        for (uint32_t i = 0; i < size; i++) {
            atomic_store_explicit(&region.first[piece + i], piece, memory_order_relaxed);
        }
    }
    pthread_mutex_unlock(&region.lock);
    if (piece == EPC_NONE) {
        return NULL;
    }
    bool used = region.pieces[piece].used;
    region.pieces[piece].used = true;
    atomic_store_explicit(&region.pieces[piece].asked,
                          (uint32_t)((bytes + EPC_PAGE - 1) / EPC_PAGE), memory_order_relaxed);
    EPC_ADD(allocated_bytes, (uint64_t)size * EPC_GRANULE);
    uintptr_t start = (uintptr_t)address_of(piece);
    void *memory = (void *)(extra ? (start + alignment - 1) / alignment * alignment : start);
    region.pieces[piece].skipped = (uint32_t)(((uintptr_t)memory - start) / EPC_PAGE);
    if (zeroed && used) { /* as an enclave of SGX1 has to: its memory was never given back */
        memset(memory, 0, (bytes + EPC_PAGE - 1) / EPC_PAGE * EPC_PAGE);
    }
    return memory;
}

/* Lock held. */
static void release_piece(uint32_t piece) {
    struct piece *entry = &region.pieces[piece];
    atomic_fetch_sub_explicit(&epc.stats->allocated_bytes, (uint64_t)entry->granules * EPC_GRANULE,
                              memory_order_relaxed);
    uint32_t first = piece * PAGES_OF_GRANULE;
    for (uint32_t i = 0; entry->unmapped > 0 && i < entry->granules * PAGES_OF_GRANULE; i++) {
        epc.pages[first + i].unmapped = 0;
    }
    entry->unmapped = 0;
    entry->next_free = region.free_list[entry->class_of];
    region.free_list[entry->class_of] = piece;
}

void epc_release(void *address) {
    pthread_mutex_lock(&region.lock);
    release_piece(piece_of(granule_of(address)));
    pthread_mutex_unlock(&region.lock);
}

size_t epc_usable(const void *address) {
    uint32_t piece = piece_of(granule_of(address));
    return (size_t)(address_of(piece + region.pieces[piece].granules) - (const char *)address);
}

void epc_clear(void *address, size_t bytes) {
    uintptr_t base = (uintptr_t)epc_region();
    size_t first = ((uintptr_t)address - base + EPC_PAGE - 1) / EPC_PAGE;
    size_t end = ((uintptr_t)address + bytes - base + EPC_PAGE - 1) / EPC_PAGE;
    if (end > epc_region_pages()) {
        end = epc_region_pages();
    }
    if (end > first) {
        epc_drop(first, end - first);
    }
}

/* Take these pages of a piece: how many of them were asked for and not taken before. The rest of its size
 * class was never anybody's. Lock held. */
static uint32_t take(uint32_t piece, uint32_t first, uint32_t stop) {
    const struct piece *entry = &region.pieces[piece];
    uint32_t begin = piece * PAGES_OF_GRANULE + entry->skipped, taken = 0;
    uint32_t end = begin + atomic_load_explicit(&entry->asked, memory_order_relaxed);
    for (uint32_t page = first > begin ? first : begin; page < stop && page < end; page++) {
        taken += !epc.pages[page].unmapped;
        epc.pages[page].unmapped = 1;
    }
    return taken;
}

void epc_unmap(void *address, size_t bytes) {
    uint32_t first = (uint32_t)(((char *)address - epc_region()) / EPC_PAGE);
    size_t after = first + (bytes + EPC_PAGE - 1) / EPC_PAGE;
    uint32_t end = (uint32_t)(after < epc_region_pages() ? after : epc_region_pages());
    pthread_mutex_lock(&region.lock);
    while (first < end) { /* piece by piece */
        uint32_t piece = piece_of(first / PAGES_OF_GRANULE);
        struct piece *entry = &region.pieces[piece];
        if (entry->granules == 0) {
            break; /* nobody has ever allocated this */
        }
        uint32_t after_piece = (piece + entry->granules) * PAGES_OF_GRANULE;
        uint32_t taken = take(piece, first, end < after_piece ? end : after_piece);
        entry->unmapped += taken;
        if (taken > 0 && entry->unmapped ==
                             atomic_load_explicit(&entry->asked, memory_order_relaxed)) {
            release_piece(piece);
        }
        first = after_piece;
    }
    pthread_mutex_unlock(&region.lock);
}

void epc_region_before_fork(void) { pthread_mutex_lock(&region.lock); }

void epc_region_after_fork(void) { pthread_mutex_unlock(&region.lock); }

size_t epc_allocation_start(size_t page) {
    return (size_t)piece_of((uint32_t)(page / PAGES_OF_GRANULE)) * PAGES_OF_GRANULE;
}

size_t epc_allocation_end(size_t page) {
    uint32_t piece = piece_of((uint32_t)(page / PAGES_OF_GRANULE));
    return (size_t)piece * PAGES_OF_GRANULE +
           atomic_load_explicit(&region.pieces[piece].asked, memory_order_relaxed);
}
