// Defines FUSEDREG_X86_64_LEVELS where the compiler can build a function for an x86-64 level of its own: GCC 12 on.
#pragma once

// With FUSEDREG_BASELINE_ONLY it does not: for tools/sanitize, whose findings are in what all levels are compiled from.
#if !defined(FUSEDREG_BASELINE_ONLY) && defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12
#define FUSEDREG_X86_64_LEVELS 1
#endif
