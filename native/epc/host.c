#define _GNU_SOURCE
#include "host.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define VARIABLE "LASAGNA_EPC"
#define CANNOT_START 125

static char directory[3072];
static char file_name[4096];
static uint64_t keep; /* the file, when the process has ended */

_Noreturn void epc_host_refuse(const char *reason) {
    char message[512];
    int length = snprintf(message, sizeof message, "lasagna epc: %s\n", reason);
    syscall(SYS_write, STDERR_FILENO, message, (size_t)length);
    _exit(CANNOT_START);
}

static bool number(const char *text, const char *name, size_t length, uint64_t *value) {
    if (strncmp(text, name, length) != 0 || text[length] != '=') {
        return false;
    }
    char *end;
    errno = 0;
    *value = strtoull(text + length + 1, &end, 10);
    if (errno != 0 || end == text + length + 1 || *end != '\0' || text[length + 1] == '-') {
        epc_host_refuse(VARIABLE ": a number was expected");
    }
    return true;
}

bool epc_host_config(struct epc_config *config) {
    const char *given = getenv(VARIABLE);
    char copy[sizeof directory + 512], *rest = copy;
    if (given == NULL) {
        return false;
    }
    if (strlen(given) >= sizeof copy) {
        epc_host_refuse(VARIABLE " is too long");
    }
    strcpy(copy, given);
    uint64_t limit = 0, region = 0;
    memset(config, 0, sizeof *config);
    for (char *item; (item = strsep(&rest, ",")) != NULL;) {
        if (strncmp(item, "stats=", 6) == 0 && strlen(item + 6) < sizeof directory) {
            strcpy(directory, item + 6);
        } else if (!number(item, "limit_pages", 11, &limit) &&
                   !number(item, "region_pages", 12, &region) &&
                   !number(item, "load_ns", 7, &config->costs.load_ns) &&
                   !number(item, "add_ns", 6, &config->costs.add_ns) &&
                   !number(item, "evict_ns", 8, &config->costs.evict_ns) &&
                   !number(item, "entry_ns", 8, &config->costs.entry_ns) &&
                   !number(item, "keep", 4, &keep)) {
            epc_host_refuse(VARIABLE " has an unknown item; see native/epc/host.h");
        }
    }
    config->limit_pages = limit;
    config->region_pages = region;
    return true;
}

static void remove_file(void) {
    if (file_name[0] != '\0' && !keep) {
        unlink(file_name);
    }
}

struct epc_stats *epc_host_stats(void) {
    int file = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS;
    if (directory[0] != '\0') {
        snprintf(file_name, sizeof file_name, "%s/%d.epc", directory, (int)getpid());
        unlink(file_name); /* of a process that is long gone */
        file = open(file_name, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
        if (file < 0 || ftruncate(file, sizeof(struct epc_stats)) != 0) {
            epc_host_refuse("the file for statistics can't be made");
        }
        flags = MAP_SHARED;
    }
    void *memory = mmap(NULL, sizeof(struct epc_stats), PROT_READ | PROT_WRITE, flags, file, 0);
    if (file >= 0) {
        close(file);
    }
    if (memory == MAP_FAILED) {
        epc_host_refuse("no memory for statistics");
    }
    return memory;
}

__attribute__((destructor)) static void finish(void) { remove_file(); }
