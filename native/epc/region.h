/* Which parts of the region are in use: the allocator of large pieces.
 *
 * Pieces begin at multiples of 64 KiB and come in sizes a quarter of a power of two apart. A piece
 * that is given back keeps its addresses for the next of its size. Its pages stay where they are, as in
 * an enclave of SGX1, which can't give memory back: in the EPC until they are evicted. */
#ifndef LASAGNA_EPC_REGION_H
#define LASAGNA_EPC_REGION_H

#include <stdbool.h>
#include <stddef.h>

#define EPC_GRANULE (64u * 1024u)

/* Once, by the pager's start; false when there is no address space for its tables. */
bool epc_region_start(void);

/* So many bytes, of zeros if that is asked for, aligned to 64 KiB or more; NULL when the region is
 * full. */
void *epc_allocate(size_t bytes, size_t alignment, bool zeroed);

/* Give a piece back; any address in it will do. */
void epc_release(void *address);

/* How much the piece that holds this address has from there on. */
size_t epc_usable(const void *address);

/* As munmap: nobody uses these pages any more; a piece is given back with its last page. */
void epc_unmap(void *address, size_t bytes);

/* Drop what whole pages of the range hold, as MADV_DONTNEED does. */
void epc_clear(void *address, size_t bytes);

/* Start and end of the allocation that holds this page, all counted in pages of the region; 0 if there
 * is none. For the pager, which doesn't wait for the allocator's lock. */
size_t epc_allocation_start(size_t page);
size_t epc_allocation_end(size_t page);

void epc_region_before_fork(void);
void epc_region_after_fork(void);

#endif
