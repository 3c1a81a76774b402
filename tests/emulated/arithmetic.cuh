// What the package's arithmetic.cuh offers, computed on a CPU.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define DEVICE inline

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

DEVICE float as_float(u32 bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
DEVICE int as_int(float x) {
    int bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}

namespace emulated {

[[noreturn]] inline void wrong(const char* what) {
    std::fprintf(stderr, "emulated kernel: %s\n", what);
    std::abort();
}

inline double from_half(u32 bits) {
    int exponent = bits >> 10 & 31, fraction = bits & 1023;
    double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return bits & 0x8000 ? -size : size;
}
inline u32 as_half(double x) {
    if (!(std::fabs(x) < 65520)) wrong("a number too large for half precision");
    int exponent = x == 0 ? -14 : std::fmax(std::ilogb(x), -14);
    double fraction = std::nearbyint(std::ldexp(std::fabs(x), 10 - exponent));
    u32 sign = std::signbit(x) ? 0x8000 : 0;
    return sign + (fraction < 1024 ? u32(fraction) : u32(fraction) - 1024 + (u32(exponent + 15) << 10));
}
inline u32 as_bfloat16(float x) { return ((u32)as_int(x) + 0x7FFF + ((u32)as_int(x) >> 16 & 1)) >> 16; }

}  // namespace emulated

DEVICE float exp2_fast(float x) {
    const float y = std::exp2(x);
    return y < 1.17549435e-38f ? 0 : y;
}
DEVICE float log2_fast(float x) { return std::log2(x); }
DEVICE float reciprocal_fast(float x) { return 1 / x; }

DEVICE u32 to_half(float low, float high) { return emulated::as_half(low) | emulated::as_half(high) << 16; }
DEVICE u32 to_bfloat16(float low, float high) { return emulated::as_bfloat16(low) | emulated::as_bfloat16(high) << 16; }
