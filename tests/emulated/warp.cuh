// What the package's warp.cuh offers, computed on a CPU. Every thread of a block is a coroutine; it runs until it needs
// others, which then run. So that what is not waited for goes wrong, a warp runs as far as it can before the next does,
// copies arrive as late as they may, and shared memory starts as rubbish.
#pragma once
#include <arithmetic.cuh>
#include <calling.cuh>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

using std::max;
using std::min;

namespace emulated {

struct Copy {
    char* to;
    const char* from;
};
struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 18);
    bool done = false, at_barrier = false;
    std::deque<std::vector<Copy>> groups;
    std::vector<Copy> open;
    int exchanges = 0;
};
// Threads that wait for each other
struct Meeting {
    int wanted = 0, arrived = 0;
    long times = 0;
};
struct Warp {
    Meeting meeting;
    u32 given[2][32][8];  // what lanes give each other, in turns
};

struct Block {
    std::vector<Thread> threads;
    std::vector<Warp> warps;
    Meeting meeting;
    std::vector<char> shared;
    ucontext_t scheduler;
    int thread = 0, index = 0;
};
inline Block* block;

inline Thread& self() { return block->threads[block->thread]; }
inline Warp& own_warp() { return block->warps[block->thread / 32]; }
inline int lane() { return block->thread % 32; }

inline void meet(Meeting& meeting) {
    long now = meeting.times;
    if (++meeting.arrived == meeting.wanted) {
        meeting.arrived = 0;
        meeting.times++;
        return;
    }
    while (meeting.times == now) swapcontext(&self().context, &block->scheduler);
}

template <class Condition>
bool any(int first, int end, Condition holds) {
    return std::any_of(block->threads.begin() + first, block->threads.begin() + end, holds);
}

// What every lane of the warp gives, for all of them
template <int COUNT>
auto exchange(const u32 (&own)[COUNT]) {
    auto& given = own_warp().given[self().exchanges++ % 2];
    std::copy(own, own + COUNT, given[lane()]);
    meet(own_warp().meeting);
    return given;
}

inline void check_shared(const char* address, int bytes) {
    long offset = address - block->shared.data();
    if (offset < 0 || offset + bytes > (long)block->shared.size()) wrong("shared memory that is not there");
    if (offset % bytes) wrong("an address in shared memory that is no multiple of its size");
}

inline int number(u32 word, int place, bool is_signed) {
    int x = word >> 4 * place & 15;
    return is_signed && x > 7 ? x - 16 : x;
}

inline void multiply(int (&sum)[4], const int* start, const u32 (&a)[4], const u32* b, bool is_signed) {
    u32 own[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    auto given = exchange(own);
    for (int i = 0; i < 4; i++) {
        int row = lane() / 4, column = lane() % 4 * 2 + i % 2;
        sum[i] = start[i];
        for (int t = 0; t < 4; t++)
            for (int half = 0; half < 2; half++)
                for (int place = 0; place < 8; place++)
                    sum[i] += number(given[4 * row + t][2 * half + i / 2], place, is_signed) *
                            number(given[4 * column + t][4 + half], place, true);
    }
}

inline void multiply_bytes(int (&sum)[4], const int* start, const u32 (&a)[2], u32 b) {
    auto given = exchange({a[0], a[1], b});
    for (int i = 0; i < 4; i++) {
        sum[i] = start[i];
        for (int t = 0; t < 4; t++)
            for (int place = 0; place < 32; place += 8)
                sum[i] += (int)(given[lane() / 4 * 4 + t][i / 2] >> place & 255) *
                          (signed char)(given[4 * (lane() % 4 * 2 + i % 2) + t][2] >> place);
    }
}

inline void (*kernel_of_block)();
inline void start() {
    kernel_of_block();
    self().done = true;
    swapcontext(&self().context, &block->scheduler);
}

// One thread block
inline void run_block(int index, int threads, int shared_bytes) {
    Block here;
    block = &here;
    here.index = index;
    here.threads.resize(threads);
    here.warps.resize(threads / 32);
    here.meeting.wanted = threads;
    for (auto& warp : here.warps) warp.meeting.wanted = 32;
    here.shared.assign(shared_bytes, (char)0xA5);
    for (auto& thread : here.threads) {
        getcontext(&thread.context);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        makecontext(&thread.context, start, 0);
    }
    for (int first = 0; any(0, threads, [](Thread& thread) { return !thread.done; }); first = (first + 32) % threads)
        while (any(first, first + 32, [](Thread& thread) { return !thread.done && !thread.at_barrier; }))
            for (here.thread = first; here.thread < first + 32; here.thread++)
                if (!self().done && !self().at_barrier) swapcontext(&here.scheduler, &self().context);
}

}  // namespace emulated

#define KERNEL(threads, programs) static void
#define UNROLL
// The function that runs a kernel; true, since what is wrong ends the process
#define EMULATED(kernel)                                                                               \
    static void** arguments;                                                                           \
    extern "C" int emulate(int blocks, int threads, int shared_bytes, unsigned seed, void** given) {   \
        arguments = given;                                                                             \
        emulated::kernel_of_block = [] { call(kernel, arguments); };                                   \
        for (int i = 0; i < blocks; i++) emulated::run_block(i, threads, shared_bytes);                \
        return true;                                                                                   \
    }

inline int thread_in_block() { return emulated::block->thread; }
inline int block_in_grid() { return emulated::block->index; }
inline char* shared_memory() { return emulated::block->shared.data(); }
inline void barrier() {
    emulated::self().at_barrier = true;
    emulated::meet(emulated::block->meeting);
    for (auto& thread : emulated::block->threads) thread.at_barrier = false;
}

inline int shuffle(int x, int from) { return emulated::exchange({(u32)x})[from][0]; }
inline int shuffle_xor(int x, int mask) { return shuffle(x, emulated::lane() ^ mask); }

inline u32 fma_half(u32 x, u32 y, u32 z) {
    using emulated::from_half;
    auto half = [&](int shift) {
        auto at = [&](u32 pair) { return from_half(pair >> shift & 0xFFFF); };
        return emulated::as_half(at(x) * at(y) + at(z)) << shift;
    };
    return half(0) | half(16);
}
inline u32 pick_bytes(u32 low, u32 high, u32 bytes) {
    uint64_t both = (uint64_t)high << 32 | low;
    u32 picked = 0;
    for (int i = 0; i < 4; i++) picked |= (u32)(both >> 8 * (bytes >> 4 * i & 7) & 255) << 8 * i;
    return picked;
}

inline void multiply(int (&sum)[4], const int* start, const u32 (&a)[4], const u32* b) {
    emulated::multiply(sum, start, a, b, true);
}
inline void multiply_unsigned(int (&sum)[4], const int* start, const u32 (&a)[4], const u32* b) {
    emulated::multiply(sum, start, a, b, false);
}

inline void multiply_bytes(int (&sum)[4], const int* start, const u32 (&a)[2], u32 b) {
    emulated::multiply_bytes(sum, start, a, b);
}

inline void load_matrices(u32 (&parts)[4], const char* row) {
    emulated::check_shared(row, 16);
    u32 offset = row - emulated::block->shared.data();
    auto given = emulated::exchange({offset});
    for (int one = 0; one < 32; one++)
        for (int other = one / 8 * 8; other < one; other++)
            if (given[one][0] != given[other][0] && (given[one][0] - given[other][0]) % 128 == 0)
                emulated::wrong("two rows of a matrix in the same banks of shared memory");
    for (int i = 0; i < 4; i++) {
        u32 from = given[8 * i + emulated::lane() / 4][0] + emulated::lane() % 4 * 4;
        std::memcpy(&parts[i], emulated::block->shared.data() + from, 4);
    }
}

inline void copy_async(char* shared, const char* global) {
    emulated::check_shared(shared, 16);
    if ((uintptr_t)global % 16) emulated::wrong("an address in global memory that is no multiple of 16");
    emulated::self().open.push_back({shared, global});
}
inline void close_group() { emulated::self().groups.push_back(std::exchange(emulated::self().open, {})); }
template <int PENDING>
void wait_for_groups() {
    auto& groups = emulated::self().groups;
    for (; groups.size() > PENDING; groups.pop_front())
        for (auto& copy : groups.front()) std::memcpy(copy.to, copy.from, 16);
}

inline void store_words(char* to, const u32* words) {
    if ((uintptr_t)to % 16) emulated::wrong("an address in global memory that is no multiple of 16");
    std::memcpy(to, words, 16);
}
