/* What the emulator tells the host while it runs: one file of shared memory for each process.
 *
 * The host maps the file and reads; nothing is locked, so sums of several counters may be off by
 * the operation that is under way. src/lasagna/tee/epc_stats.py mirrors this layout. */
#ifndef LASAGNA_EPC_STATS_H
#define LASAGNA_EPC_STATS_H

#include <stdatomic.h>
#include <stdint.h>

#define EPC_STATS_MAGIC UINT64_C(0x314350456e67734c) /* "LsgnEPC1" */
#define EPC_STATS_THREADS 64
#define EPC_STATS_RANGES 8 /* the region, and seven of the emulator's own */

typedef _Atomic uint64_t epc_counter;

/* The last entry of the table is for all threads that found no other. */
#define EPC_STATS_OTHERS UINT32_MAX

struct epc_thread_stats {
    epc_counter tid;      /* of the thread that faulted; 0: entry is free; or EPC_STATS_OTHERS */
    epc_counter faults;   /* pages loaded or added for it */
    epc_counter fault_ns; /* from taking the fault up to resolving it, charge included */
};

struct epc_stats {
    epc_counter magic;
    epc_counter pid;
    /* Set by the process at its start; the host may change the limit and the charges later. */
    epc_counter limit_pages;
    epc_counter region_pages;
    /* What an operation is charged, and what it costs here without a charge (measured). */
    epc_counter charge_load_ns;
    epc_counter charge_add_ns;
    epc_counter charge_evict_ns;
    epc_counter charge_entry_ns;
    epc_counter own_latency_ns; /* of a fault outside the pager: kernel and two context switches */
    epc_counter own_load_ns;    /* pager's part of a load: decrypt and map */
    epc_counter own_evict_ns;   /* pager's part of an eviction: unmap and encrypt */
    /* Levels, in pages. */
    epc_counter resident_pages; /* mapped, on probation, or promised to a fault */
    epc_counter free_pages;     /* frames that can be given out at once */
    epc_counter evicted_pages;  /* sealed in the backing store now */
    epc_counter allocated_bytes;
    epc_counter peak_resident_pages;
    /* Sums since the start. */
    epc_counter added;       /* first touches; the first of the sums */
    epc_counter loaded;      /* decrypted and checked */
    epc_counter ahead;       /* of added and loaded: with the fault of another page */
    epc_counter evicted;     /* encrypted */
    epc_counter second_chances; /* touched while on probation: kept */
    epc_counter waits;       /* faults that found no free frame */
    epc_counter wait_ns;     /* that they waited for the reclaimer; not in load_ns, and not made good */
    epc_counter load_ns;     /* of faulting threads, own latency included */
    epc_counter evict_ns;    /* of the reclaimer */
    epc_counter late_loads;  /* own cost was above the charge */
    epc_counter late_evicts;
    epc_counter unpaid_ns;   /* of late loads: what later ones could not make good */
    epc_counter entries;     /* enclave transitions that were charged: entry and exit are one */
    epc_counter entry_ns;    /* what they were charged; the last of the sums */
    /* The emulator's own memory, which no enclave would have: its frames, backing store and tables.
     * Who measures the process's footprint leaves it out, and the region. */
    epc_counter own_start[EPC_STATS_RANGES];
    epc_counter own_bytes[EPC_STATS_RANGES];
    struct epc_thread_stats threads[EPC_STATS_THREADS];
};

#endif
