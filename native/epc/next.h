/* The functions that ours stand in front of: those of the same name in the next library, libc as a rule.
 * They are called rather than the kernel, since they are cancellation points. */
#ifndef LASAGNA_EPC_NEXT_H
#define LASAGNA_EPC_NEXT_H

#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>

#define EPC_DECLARE_NEXT(name) static __typeof__(&name) next_##name;
#define EPC_FIND_NEXT(name) next_##name = (__typeof__(&name))(uintptr_t)dlsym(RTLD_NEXT, #name);

/* Once a file, with a list of its functions: #define LIST(each) each(read) each(write). They are looked up
 * when this library starts, since a signal handler must not; or when a library that starts before calls
 * one. dlsym calls none of them, so there is no way round to here. */
#define EPC_NEXT(list)                                                              \
    list(EPC_DECLARE_NEXT)                                                          \
    __attribute__((constructor)) static void find_next(void) { list(EPC_FIND_NEXT) }

#define EPC_CALL_NEXT(name, ...) \
    ((next_##name == NULL ? find_next() : (void)0), next_##name(__VA_ARGS__))

#endif
