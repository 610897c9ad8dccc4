#include "seal.h"

#include <openssl/evp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

#define NONCE 12
#define AAD 16

struct epc_sealer {
    EVP_CIPHER_CTX *encrypt;
    EVP_CIPHER_CTX *decrypt;
};

/* Not from libcrypto, whose generator may be locked by another thread when a program forks. */
bool epc_random_key(unsigned char key[EPC_KEY]) {
    return getrandom(key, EPC_KEY, 0) == EPC_KEY;
}

struct epc_sealer *epc_sealer_new(const unsigned char key[EPC_KEY]) {
    struct epc_sealer *sealer = calloc(1, sizeof *sealer);
    if (sealer == NULL) {
        return NULL;
    }
    sealer->encrypt = EVP_CIPHER_CTX_new();
    sealer->decrypt = EVP_CIPHER_CTX_new();
    /* The key is expanded once; a page sets the nonce alone. */
    if (sealer->encrypt == NULL || sealer->decrypt == NULL ||
        EVP_EncryptInit_ex(sealer->encrypt, EVP_aes_128_gcm(), NULL, key, NULL) != 1 ||
        EVP_DecryptInit_ex(sealer->decrypt, EVP_aes_128_gcm(), NULL, key, NULL) != 1) {
        epc_sealer_free(sealer);
        return NULL;
    }
    return sealer;
}

void epc_sealer_free(struct epc_sealer *sealer) {
    if (sealer != NULL) {
        EVP_CIPHER_CTX_free(sealer->encrypt);
        EVP_CIPHER_CTX_free(sealer->decrypt);
        free(sealer);
    }
}

static void bind(uint64_t page, uint64_t version, unsigned char nonce[NONCE],
                 unsigned char aad[AAD]) {
    memset(nonce, 0, NONCE);
    memcpy(nonce, &version, sizeof version);
    memcpy(aad, &page, sizeof page);
    memcpy(aad + sizeof page, &version, sizeof version);
}

bool epc_seal(struct epc_sealer *sealer, uint64_t page, uint64_t version,
              const unsigned char *plain, unsigned char *sealed, unsigned char tag[EPC_TAG]) {
    unsigned char nonce[NONCE], aad[AAD];
    int length = 0;
    bind(page, version, nonce, aad);
    EVP_CIPHER_CTX *context = sealer->encrypt;
    return EVP_EncryptInit_ex(context, NULL, NULL, NULL, nonce) == 1 &&
           EVP_EncryptUpdate(context, NULL, &length, aad, AAD) == 1 &&
           EVP_EncryptUpdate(context, sealed, &length, plain, EPC_PAGE) == 1 &&
           EVP_EncryptFinal_ex(context, sealed + length, &length) == 1 &&
           EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_GCM_GET_TAG, EPC_TAG, tag) == 1;
}

bool epc_open(struct epc_sealer *sealer, uint64_t page, uint64_t version,
              const unsigned char *sealed, const unsigned char tag[EPC_TAG],
              unsigned char *plain) {
    unsigned char nonce[NONCE], aad[AAD], expected[EPC_TAG];
    int length = 0;
    bind(page, version, nonce, aad);
    memcpy(expected, tag, EPC_TAG);
    EVP_CIPHER_CTX *context = sealer->decrypt;
    return EVP_DecryptInit_ex(context, NULL, NULL, NULL, nonce) == 1 &&
           EVP_DecryptUpdate(context, NULL, &length, aad, AAD) == 1 &&
           EVP_DecryptUpdate(context, plain, &length, sealed, EPC_PAGE) == 1 &&
           EVP_CIPHER_CTX_ctrl(context, EVP_CTRL_GCM_SET_TAG, EPC_TAG, expected) == 1 &&
           EVP_DecryptFinal_ex(context, plain + length, &length) == 1;
}
