/* The pager: a region of memory of which at most so many pages are resident.
 *
 * Pages are evicted and loaded as the Linux SGX driver does it (arch/x86/kernel/cpu/sgx/main.c and
 * encl.c): one queue in order of loading, a second chance for what was touched, batches of 16, a
 * reclaimer thread that wakes when few frames are free, faults one after the other. What the
 * processor does there, encrypt and check, libcrypto does here.
 *
 * There is no accessed bit to read from user space. So the oldest quarter of the queue is on
 * probation: unmapped, but still in memory as plaintext. Who touches such a page gets it back at
 * once, at the young end of the queue; that costs a fault that hardware would not have, which is
 * deducted from later charges. See docs/adr/0005-epc-emulator.md. */
#ifndef LASAGNA_EPC_PAGER_H
#define LASAGNA_EPC_PAGER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "stats.h"

/* Costs in nanoseconds that an operation is brought up to; 0 for no charge. */
struct epc_costs {
    uint64_t load_ns;  /* fault and page-in, for the faulting thread */
    uint64_t add_ns;   /* fault and first touch */
    uint64_t evict_ns; /* page-out, for the reclaimer */
    uint64_t entry_ns; /* entering and leaving the enclave, for the calling thread */
};

struct epc_config {
    size_t limit_pages; /* at least EPC_MIN_PAGES */
    size_t region_pages;
    struct epc_costs costs;
};

#define EPC_MIN_PAGES 256

/* Reserve the region and start both threads. On failure returns false and says in `reason` why: the
 * kernel lacks or forbids userfaultfd with UFFDIO_MOVE (Linux 6.8), or memory is short.
 * `stats` is shared memory of the caller; it is filled in. One pager a process. */
bool epc_pager_start(const struct epc_config *config, struct epc_stats *stats, char *reason,
                     size_t reason_size);

/* The region; pages are counted from its start. */
char *epc_region(void);
size_t epc_region_pages(void);
bool epc_contains(const void *address);
bool epc_overlaps(const void *address, size_t bytes);

/* The descriptor that all depends on, which the program must not close; -1 before the start. */
int epc_descriptor(void);

/* Forget what the pages hold, wherever it is: they read as zero when touched again. Nobody may use
 * them meanwhile. */
void epc_drop(size_t first, size_t count);

/* Evict every page that is resident now; for calibration and tests. */
void epc_evict_all(void);

/* Around fork, in this order; the child gets threads, a key and statistics of its own. */
void epc_before_fork(void);
void epc_after_fork_in_parent(void);
void epc_after_fork_in_child(struct epc_stats *stats);

/* Spin as long as leaving the enclave and entering it again takes, and count it. */
void epc_charge_entry(void);

/* For tests: the ciphertext of a page that is evicted, or NULL. */
unsigned char *epc_backing_of_page(size_t page);

/* Say what went wrong on stderr and end the process. */
_Noreturn void epc_die(const char *what);

uint64_t epc_now_ns(void);

#endif
