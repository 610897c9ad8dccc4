/* Pages in the backing store: AES-128-GCM, as SGX's EWB and ELDU use (128-bit keys).
 *
 * The nonce is the page's version, a number that is never used twice under one key; the associated
 * data is the page's number and its version. So a page opens only at its address and only in the
 * state in which it was evicted last. */
#ifndef LASAGNA_EPC_SEAL_H
#define LASAGNA_EPC_SEAL_H

#include <stdbool.h>
#include <stdint.h>

#define EPC_PAGE 4096u
#define EPC_TAG 16u
#define EPC_KEY 16u

struct epc_sealer; /* one for every thread that seals or opens */

/* A fresh key from the system's random generator. */
bool epc_random_key(unsigned char key[EPC_KEY]);

struct epc_sealer *epc_sealer_new(const unsigned char key[EPC_KEY]);
void epc_sealer_free(struct epc_sealer *sealer);

/* Encrypt one page. False when libcrypto fails, which it has no reason to. */
bool epc_seal(struct epc_sealer *sealer, uint64_t page, uint64_t version,
              const unsigned char *plain, unsigned char *sealed, unsigned char tag[EPC_TAG]);

/* Decrypt and check one page. False when it is not what was sealed; `plain` is undefined then. */
bool epc_open(struct epc_sealer *sealer, uint64_t page, uint64_t version,
              const unsigned char *sealed, const unsigned char tag[EPC_TAG],
              unsigned char *plain);

#endif
