/* CTest: the library links, loads under the chosen sanitizers, and tells the truth about itself. */
#include "buildinfo.h"

#include <stdio.h>
#include <string.h>

static int failures;

/* Not assert(): a release build compiles that away. */
static void check(int holds, const char *what)
{
    printf("%s %s\n", holds ? "ok    " : "FAILED", what);
    failures += !holds;
}

int main(void)
{
    const struct lasagna_build_info *info = lasagna_build_info();

    check(strcmp(info->version, EXPECTED_VERSION) == 0, "version is pyproject.toml's");
    check(strcmp(info->sanitizer, EXPECTED_SANITIZER) == 0, "sanitizer is the one asked for");
    check(strlen(info->compiler) > 0, "compiler is named");
    check(strlen(info->cpu) > 0, "target is named");
    check(strlen(info->build_type) > 0, "build type is named");
    check(strstr(info->flags, "-Werror") != NULL, "flags hold -Werror");
#if defined(__SANITIZE_ADDRESS__)
    check(strstr(info->sanitizer, "address") != NULL, "an ASan build says so");
#endif
#if defined(__SSE2__)
    check(strncmp(info->instruction_sets, "sse2", 4) == 0, "instruction sets hold SSE2");
#endif
    return failures != 0;
}
