// The instructions of sm_90a that sm90.cu uses, each under a name. Addresses of shared memory are 32-bit numbers.
#pragma once

#include <arithmetic.cuh>

DEVICE int thread() { return threadIdx.x; }
DEVICE int program() { return blockIdx.x; }

// Shared memory, barriers and copies ----------------------------------------------------------------------------------

DEVICE u32 shared_memory() {
    extern __shared__ __align__(1024) u8 memory[];
    return (u32)__cvta_generic_to_shared(memory);
}

DEVICE void write_shared(u32 address, u32 value) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

DEVICE u32 read_shared(u32 address) {
    u32 value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    return value;
}

DEVICE void barrier_init(u32 barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

DEVICE void barrier_arrive(u32 barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrive, and let the barrier wait for so many bytes too.
DEVICE void barrier_expect(u32 barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Wait for the end of the barrier's even (parity 0) or odd (1) phase.
DEVICE void barrier_wait(u32 barrier, u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(barrier), "r"(parity) : "memory");
}

// Copy bytes of global memory, which count towards a barrier's phase.
DEVICE void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to),
                 "l"(from), "r"(bytes), "r"(barrier) : "memory");
}

// What this thread wrote to shared memory, barriers included, is seen by copies and matrix units from here on.
DEVICE void publish() {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

DEVICE void synchronize() { __syncthreads(); }

// Lanes of a warp -----------------------------------------------------------------------------------------------------

DEVICE void meet_warp() { __syncwarp(); }

// True in one lane, always the same: the compiler makes no loop over lanes around copies then.
DEVICE bool one_lane() {
    u32 one;
    asm volatile(
        "{\n"
        ".reg .pred one;\n"
        "elect.sync _|one, 0xFFFFFFFF;\n"
        "selp.b32 %0, 1, 0, one;\n"
        "}" : "=r"(one));
    return one;
}

DEVICE bool any_lane(bool x) { return __any_sync(0xFFFFFFFF, x); }
DEVICE int same_in_warp(int x) { return __shfl_sync(0xFFFFFFFF, x, 0); }  // says so to the compiler
DEVICE u32 from_lane(u32 x, int distance) { return __shfl_xor_sync(0xFFFFFFFF, x, distance); }
DEVICE float from_lane(float x, int distance) { return __shfl_xor_sync(0xFFFFFFFF, x, distance); }

// Arithmetic ----------------------------------------------------------------------------------------------------------

DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float larger(float a, float b) { return fmaxf(a, b); }
DEVICE u32 larger(u32 a, u32 b) { return (u32)max((int)a, (int)b); }
DEVICE float to_float(u32 x) { return __int2float_rn((int)x); }

// Sum of the four bytes of x, added to sum.
DEVICE u32 add_bytes(u32 x, u32 sum) {
    u32 y;
    asm("dp4a.u32.u32 %0, %1, 0x01010101, %2;" : "=r"(y) : "r"(x), "r"(sum));
    return y;
}

// Four floats as FP8 (e4m3), the first in the lowest byte.
DEVICE u32 pack_fp8(float a, float b, float c, float d) {
    u32 y;
    asm("{\n"
        ".reg .b16 low, high;\n"
        "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
        "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
        "mov.b32 %0, {low, high};\n"
        "}" : "=r"(y) : "f"(a), "f"(b), "f"(c), "f"(d));
    return y;
}

// Four numbers from 0 to 255 times 2⁻²⁴, rounded to bytes: in half precision the bits of n · 2⁻²⁴ are n.
DEVICE u32 pack_bytes(float a, float b, float c, float d) {
    u32 y;
    asm("{\n"
        ".reg .b32 low, high;\n"
        "cvt.rn.f16x2.f32 low, %2, %1;\n"
        "cvt.rn.f16x2.f32 high, %4, %3;\n"
        "prmt.b32 %0, low, high, 0x6420;\n"
        "}" : "=r"(y) : "f"(a), "f"(b), "f"(c), "f"(d));
    return y;
}

// Products of a warpgroup ---------------------------------------------------------------------------------------------

// Where rows of 128 or 64 bytes lie in shared memory, swizzled by as much, eight rows after eight rows.
template <int ROW_BYTES>
DEVICE u64 descriptor(u32 address) {
    static_assert(ROW_BYTES == 128 || ROW_BYTES == 64, "rows are as long as their swizzle");
    const u64 swizzle = ROW_BYTES == 128 ? 1 : 2;
    return swizzle << 62 | (u64)(8 * ROW_BYTES >> 4) << 32 | (u64)(address >> 4);
}

// Registers written so far may be read by the products that follow.
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Wait until at most so many of the committed groups are under way.
template <int GROUPS>
DEVICE void products_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory"); }

// The compiler neither reads nor writes these registers across this point.
template <int N>
DEVICE void settle(u32 (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

template <int N>
DEVICE void settle(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

#define NAMES_32                                                                                                     \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define NAMES_36 NAMES_32 ", %32, %33, %34, %35"
#define NAMES_64                                                                                                     \
    NAMES_36 ", %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, " \
             "%56, %57, %58, %59, %60, %61, %62, %63"
#define NAMES_68 NAMES_64 ", %64, %65, %66, %67"
#define FOUR(kind, x, i) kind(x[i]), kind(x[i + 1]), kind(x[i + 2]), kind(x[i + 3])
#define SIXTEEN(kind, x, i) FOUR(kind, x, i), FOUR(kind, x, i + 4), FOUR(kind, x, i + 8), FOUR(kind, x, i + 12)
#define ALL_32(kind, x) SIXTEEN(kind, x, 0), SIXTEEN(kind, x, 16)
#define ALL_36(kind, x) ALL_32(kind, x), FOUR(kind, x, 32)
#define ALL_64(kind, x) ALL_32(kind, x), SIXTEEN(kind, x, 32), SIXTEEN(kind, x, 48)
#define ALL_68(kind, x) ALL_64(kind, x), FOUR(kind, x, 64)

template <int COUNT>
struct Columns {};

// scores = 64 rows of Q times as many rows of K as there are columns, over 32 channels; added to what they are if `add`.
#define MULTIPLY_SCORES(COUNT, COLUMNS, Q, K, ADD)                                                               \
    template <int N>                                                                                             \
    DEVICE void multiply_scores(Columns<COLUMNS>, u32 (&scores)[N], u64 q, u64 k, bool add) {                    \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n"                                        \
                     "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k32.s32.s8.s8 {" NAMES_##COUNT "}, " Q ", " K \
                     ", add;\n}" : ALL_##COUNT("+r", scores) : "l"(q), "l"(k), "r"((int)add) : "memory");        \
    }

// sums = P times V over 32 keys, added to what they are if `add`; P in registers.
#define MULTIPLY_VALUES(NAME, KIND, FORMATS, NEGATE, COUNT, COLUMNS, A, B, C, D, V, ADD)                            \
    template <int N>                                                                                                \
    DEVICE void NAME(Columns<COLUMNS>, u32 (&sums)[N], u32 a, u32 b, u32 c, u32 d, u64 v, bool add) {               \
        asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ADD ", 0;\n"                                           \
                     "wgmma.mma_async.sync.aligned.m64n" #COLUMNS "k32." FORMATS " {" NAMES_##COUNT "}, {" A ", " B \
                     ", " C ", " D "}, " V ", add" NEGATE ";\n}"                                                    \
                     : ALL_##COUNT(KIND, sums) : "r"(a), "r"(b), "r"(c), "r"(d), "l"(v), "r"((int)add) : "memory"); \
    }

#define BYTES_OF_P "s32.u8.s8", ""
#define FP8_OF_P "f32.e4m3.e4m3", ", 1, 1"
#define EXPAND(macro, ...) macro(__VA_ARGS__)

MULTIPLY_SCORES(32, 64, "%32", "%33", "%34")
MULTIPLY_SCORES(64, 128, "%64", "%65", "%66")
EXPAND(MULTIPLY_VALUES, multiply_bytes, "+r", BYTES_OF_P, 32, 64, "%32", "%33", "%34", "%35", "%36", "%37")
EXPAND(MULTIPLY_VALUES, multiply_bytes, "+r", BYTES_OF_P, 64, 128, "%64", "%65", "%66", "%67", "%68", "%69")
EXPAND(MULTIPLY_VALUES, multiply_fp8, "+r", FP8_OF_P, 36, 72, "%36", "%37", "%38", "%39", "%40", "%41")
EXPAND(MULTIPLY_VALUES, multiply_fp8, "+r", FP8_OF_P, 68, 136, "%68", "%69", "%70", "%71", "%72", "%73")
