/* userfaultfd, as far as the pager needs it. Linux 6.8 or newer, for UFFDIO_MOVE. */
#ifndef LASAGNA_EPC_UFFD_H
#define LASAGNA_EPC_UFFD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct epc_fault {
    uintptr_t address; /* of the page */
    uint32_t tid;      /* of the thread that touched it */
};

/* Open; -1 and a reason when the kernel lacks it or forbids it. */
int epc_uffd_open(char *reason, size_t reason_size);
void epc_uffd_close(int uffd);
bool epc_uffd_register(int uffd, void *start, size_t bytes);

/* Wait for faults; at most `room` of them. Returns how many, 0 when interrupted. */
size_t epc_uffd_read(int uffd, struct epc_fault *faults, size_t room);

/* Move pages to addresses that must have none; their old addresses fault from then on. Returns how many
 * were moved. Fewer than asked for: errno says why the next one was not. ENOENT, there is no page to
 * move; EBUSY, the kernel holds it elsewhere too. */
size_t epc_uffd_move(int uffd, void *to, void *from, size_t pages);

/* Map new pages with copies of this content, and wake who waits for them. Returns how many were mapped.
 * Fewer than asked for: errno says why the next one was not. */
size_t epc_uffd_copy(int uffd, void *to, const void *from, size_t pages);

/* Let who waits for this page try again. */
void epc_uffd_wake(int uffd, void *page);

/* The system's own calls: in a process under the emulator `mmap` and `madvise` are ours. */
void *epc_reserve(size_t bytes); /* NULL when address space is short */
void epc_discard(void *start, size_t bytes);
void epc_small_pages(void *start, size_t bytes);

#endif
