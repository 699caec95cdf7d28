// Includes FUSEDREG_LOOPS once for each instruction set that this compiler can build a function for, with FUSEDREG_ISA
// (a namespace), FUSEDREG_TARGET (a function attribute) and FUSEDREG_VECTOR_BYTES defined. The maths is always_inline,
// so it is compiled for the instruction set of the loop that it is inlined into.
#if !defined(FUSEDREG_LOOPS)
#error "define FUSEDREG_LOOPS, a header's name, before this one"
#endif

#include "x86_64.h"

#define FUSEDREG_ISA baseline
#define FUSEDREG_TARGET
#define FUSEDREG_VECTOR_BYTES 16
#include FUSEDREG_LOOPS
#undef FUSEDREG_ISA
#undef FUSEDREG_TARGET
#undef FUSEDREG_VECTOR_BYTES

#if defined(FUSEDREG_X86_64_LEVELS)
// AVX2 and FMA
#define FUSEDREG_ISA x86_64_v3
#define FUSEDREG_TARGET __attribute__((target("arch=x86-64-v3")))
#define FUSEDREG_VECTOR_BYTES 32
#include FUSEDREG_LOOPS
#undef FUSEDREG_ISA
#undef FUSEDREG_TARGET
#undef FUSEDREG_VECTOR_BYTES

// AVX-512
#define FUSEDREG_ISA x86_64_v4
#define FUSEDREG_TARGET __attribute__((target("arch=x86-64-v4")))
#define FUSEDREG_VECTOR_BYTES 64
#include FUSEDREG_LOOPS
#undef FUSEDREG_ISA
#undef FUSEDREG_TARGET
#undef FUSEDREG_VECTOR_BYTES
#endif
