// Instructions of a warp and of a thread block by name. Tests compile kernels against a header of the same name that
// computes the same on a CPU.
#pragma once

#include <arithmetic.cuh>

#define KERNEL(threads, programs) extern "C" __global__ void __launch_bounds__(threads, programs)
#define UNROLL _Pragma("unroll")

DEVICE int thread_in_block() { return threadIdx.x; }
DEVICE int block_in_grid() { return blockIdx.x; }
DEVICE char* shared_memory() {
    extern __shared__ __align__(128) char memory[];
    return memory;
}
DEVICE void barrier() { __syncthreads(); }

DEVICE int shuffle(int x, int lane) { return __shfl_sync(~0u, x, lane); }
DEVICE int shuffle_xor(int x, int mask) { return __shfl_xor_sync(~0u, x, mask); }

// x y + z of two numbers in half precision
DEVICE u32 fma_half(u32 x, u32 y, u32 z) {
    u32 pair;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(x), "r"(y), "r"(z));
    return pair;
}

// Byte i of the result is byte 0…7 of high:low, as hexadecimal digit i of `bytes` says
DEVICE u32 pick_bytes(u32 low, u32 high, u32 bytes) { return __byte_perm(low, high, bytes); }

// sum = start + a bᵀ with a (16, 64), b (8, 64) and sum (16, 8). Lane 4 r + t holds, eight numbers of four bits in a
// register, a: rows r, r + 8, r, r + 8, columns 8 t… of the first half twice, then of the second; b: row r, both
// halves; sum: rows r, r, r + 8, r + 8, columns 2 t, 2 t + 1 twice.
DEVICE void multiply(int (&sum)[4], const int* start, const u32 (&a)[4], const u32* b) {
    asm("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(sum[0]), "=r"(sum[1]), "=r"(sum[2]), "=r"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(start[0]), "r"(start[1]),
          "r"(start[2]), "r"(start[3]));
}
// The same with a of 0…15 instead of −8…7
DEVICE void multiply_unsigned(int (&sum)[4], const int* start, const u32 (&a)[4], const u32* b) {
    asm("mma.sync.aligned.m16n8k64.row.col.s32.u4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%10, %11, %12, %13};"
        : "=r"(sum[0]), "=r"(sum[1]), "=r"(sum[2]), "=r"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(start[0]), "r"(start[1]),
          "r"(start[2]), "r"(start[3]));
}

// sum = start + a bᵀ with a (16, 16) of 0…255, b (8, 16) of −128…127 and sum as above. Lane 4 r + t holds bytes 4 t… of
// rows r and r + 8 of a, and of row r of b.
DEVICE void multiply_bytes(int (&sum)[4], const int* start, const u32 (&a)[2], u32 b) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %8, %9, %10};"
        : "=r"(sum[0]), "=r"(sum[1]), "=r"(sum[2]), "=r"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(b), "r"(start[0]), "r"(start[1]), "r"(start[2]), "r"(start[3]));
}

// Four matrices of 8 rows of 16 bytes: lane 8 i + r says where row r of matrix i is; lane 4 r + t gets its t-th word
DEVICE void load_matrices(u32 (&parts)[4], const char* row) {
    u32 address = (u32)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(parts[0]), "=r"(parts[1]), "=r"(parts[2]), "=r"(parts[3])
                 : "r"(address)
                 : "memory");
}

// Copies of 16 bytes into shared memory that go on by themselves; those between two `close_group` are a group
DEVICE void copy_async(char* shared, const char* global) {
    u32 address = (u32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}
DEVICE void close_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Wait until all groups of this thread but so many of the latest have arrived
template <int PENDING>
DEVICE void wait_for_groups() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four words at once, to a multiple of 16 bytes
DEVICE void store_words(char* to, const u32* words) {
    *(uint4*)to = make_uint4(words[0], words[1], words[2], words[3]);
}
