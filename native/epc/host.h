/* What the emulator gets from the host's side: its configuration and a place for its statistics. */
#ifndef LASAGNA_EPC_HOST_H
#define LASAGNA_EPC_HOST_H

#include <stdbool.h>

#include "pager.h"

/* Read the variable LASAGNA_EPC:
 *   limit_pages=23936,region_pages=16777216,load_ns=11500,add_ns=8250,
 *   evict_ns=11000,entry_ns=4000,stats=/dev/shm/lasagna,keep=0
 * False when it is not set. Refuses, and ends the process, when it is malformed. */
bool epc_host_config(struct epc_config *config);

/* A new file <stats directory>/<pid>.epc, mapped; without a directory, private memory. It is removed
 * at the process's end unless keep=1, for whoever reads the last figures. */
struct epc_stats *epc_host_stats(void);

/* Say why the program can't run under the emulator, and end it with status 125. */
_Noreturn void epc_host_refuse(const char *reason);

#endif
