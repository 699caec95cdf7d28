// In the wheel alone: what its compiler's runtime libraries have had for a few years, and older systems lack. With it,
// the wheel asks for no newer system than torch's own wheels do.
#include <new>

#include "../cpu/x86_64.h"

#if !defined(FUSEDREG_X86_64_LEVELS)
#error "the wheel has kernels for all three instruction sets: build it with GCC 12 or later, for x86-64"
#endif

// pow under the name that it had before glibc 2.29, which also sets errno. The linker puts it in pow's place, as
// -Wl,--wrap=pow asks.
__asm__(".symver pow_of_older_systems, pow@GLIBC_2.2.5");
extern "C" double pow_of_older_systems(double base, double exponent);
extern "C" double __wrap_pow(double base, double exponent) { return pow_of_older_systems(base, exponent); }

// Of GCC 11's libstdc++: a container of more elements than memory has addresses.
namespace std {
[[noreturn]] void __throw_bad_array_new_length() { throw std::bad_alloc(); }
}  // namespace std
