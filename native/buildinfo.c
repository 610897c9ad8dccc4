#include "buildinfo.h"

/* What the target guarantees, not what the machine at hand has: code for more than this must ask
 * the processor first. */
static const char instruction_sets[] = ""
#if defined(__SSE2__)
                                       "sse2"
#endif
#if defined(__AES__)
                                       " aes"
#endif
#if defined(__AVX2__)
                                       " avx2"
#endif
#if defined(__AVX512F__)
                                       " avx512f"
#endif
#if defined(__ARM_NEON)
                                       "neon"
#endif
    ;

static const struct lasagna_build_info build_info = {
    .version = LASAGNA_VERSION,
    .compiler = LASAGNA_COMPILER,
    .flags = LASAGNA_FLAGS,
    .cpu = LASAGNA_CPU,
    .instruction_sets = instruction_sets,
    .build_type = LASAGNA_BUILD_TYPE,
    .sanitizer = LASAGNA_SANITIZER,
};

const struct lasagna_build_info *lasagna_build_info(void)
{
    return &build_info;
}
