// Defines FUSEDREG_X86_64_LEVELS where the compiler can build a function for an x86-64 level of its own: GCC 12 on.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FUSEDREG_X86_64_LEVELS 1
#endif
