/* How this shared library was built, for the report beside every benchmark. */
#ifndef LASAGNA_BUILDINFO_H
#define LASAGNA_BUILDINFO_H

#if defined(__GNUC__)
#define LASAGNA_API __attribute__((visibility("default")))
#else
#define LASAGNA_API
#endif

/* Static strings, never NULL. src/lasagna/native.py mirrors this struct field by field. */
struct lasagna_build_info {
    const char *version;          /* of the package, "0.1.0" */
    const char *compiler;         /* "GNU 12.2.0" */
    const char *flags;            /* as given to the compiler, without paths */
    const char *cpu;              /* target architecture, "x86_64" */
    const char *instruction_sets; /* the compiler may use these without asking, "sse2 avx2" */
    const char *build_type;       /* CMake's, "Release" */
    const char *sanitizer;        /* "address,undefined", or "none" */
};

LASAGNA_API const struct lasagna_build_info *lasagna_build_info(void);

#endif
