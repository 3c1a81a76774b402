// Stands in for kernels/cuda/sm90_ptx.cuh on a CPU: the threads of a program take turns as fibres, in an order that a
// seed decides, and everything asynchronous happens as late as it may: copies when a seeded coin says so or nobody can
// go on, a warp's part of a product some time after it waits for it. Whoever reads or writes what is still under way
// gets wrong results.
//
// Layouts are those of the PTX manual: registers of wgmma's A and D, matrix descriptors and their swizzles.
#pragma once

#include <arithmetic.cuh>
#include <calling.cuh>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)

// The function that runs a kernel, program after program; false if something is wrong, which stderr says
#define EMULATED(kernel)                                                                               \
    extern "C" int emulate(int blocks, int threads, int shared_bytes, unsigned seed, void** given) {   \
        bool right = threads == THREADS && shared_bytes == Q_FULL_AT + 8;                              \
        for (int block = 0; right && block < blocks; ++block)                                          \
            right = machine::run(block, threads, seed, [&] { call(kernel, given); });                  \
        return right;                                                                                  \
    }

namespace machine {

constexpr u32 BASE = 1024, SHARED = 227 * 1024;
constexpr size_t STACK = 256 * 1024;

[[noreturn]] void fail(const char* what);

inline void check(bool right, const char* what) {
    if (!right) fail(what);
}

struct Barrier {
    u32 arrivals, waiting, odd = 0;
    long bytes = 0;
    void turn() {
        if (waiting == 0 && bytes == 0) waiting = arrivals, odd ^= 1;
    }
};

struct Meeting {  // of lanes, of threads at a named barrier, or of all
    u32 here = 0, times = 0;
};

struct Copy {
    u32 to, bytes, barrier;
    const void* from;
};

struct Product {
    bool int8, from_memory, add;
    int columns;
    u64 a, b;
    const u32* four[4];
    void* sums;
};

struct Fibre {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
    std::deque<std::vector<Product>> groups;  // committed, the oldest first
    std::vector<Product> open;
    long committed = 0, finished = 0;
    u32 met = 0;
};

struct Program {
    std::vector<u8> shared;
    std::map<u32, Barrier> barriers;
    std::vector<Copy> copies;
    std::map<int, Meeting> warps;
    std::map<int, std::vector<u64>> lanes;
    Meeting all;
    std::vector<Fibre> fibres;
    ucontext_t scheduler;
    int current = 0, index = 0;
    bool moved = true, failed = false, inside = false;
    std::mt19937 coin;
    std::function<void()> body;
};

inline Program* now = nullptr;

inline void yield() { swapcontext(&now->fibres[now->current].context, &now->scheduler); }

// Say what is wrong; a thread that does never goes on, and the program ends.
[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "%s\n", what);
    if (!now->inside) std::_Exit(3);
    now->failed = true;
    for (;;) yield();
}

template <class Condition>
void wait_until(Condition condition) {
    while (!condition()) yield();
    now->moved = true;
}

inline void be_late(int turns) {
    for (; turns > 0; --turns) {
        now->moved = true;
        yield();
    }
}

inline Barrier& barrier(u32 at) {
    auto found = now->barriers.find(at);
    check(found != now->barriers.end(), "a barrier is used before it is made");
    return found->second;
}

inline void deliver(size_t which) {
    const Copy copy = now->copies[which];
    now->copies.erase(now->copies.begin() + which);
    std::memcpy(now->shared.data() + copy.to, copy.from, copy.bytes);
    Barrier& b = barrier(copy.barrier);
    b.bytes -= copy.bytes;
    b.turn();
    now->moved = true;
}

inline void enter() {
    now->body();
    now->fibres[now->current].done = true;
    now->moved = true;
    yield();
}

// Program `index`; whether all went well.
inline bool run(int index, int threads, unsigned seed, std::function<void()> body) {
    Program program;
    now = &program;
    program.index = index;
    program.shared.assign(BASE + SHARED, 0xA5);
    program.coin.seed(seed + 977 * index);
    program.body = body;
    program.fibres = std::vector<Fibre>(threads);
    for (auto& fibre : program.fibres) {
        fibre.stack.reset(new char[STACK]);
        getcontext(&fibre.context);
        fibre.context.uc_stack.ss_sp = fibre.stack.get();
        fibre.context.uc_stack.ss_size = STACK;
        fibre.context.uc_link = &program.scheduler;
        makecontext(&fibre.context, (void (*)())enter, 0);
    }
    std::vector<int> warps(threads / 32);
    for (size_t i = 0; i < warps.size(); ++i) warps[i] = i;
    for (bool left = true; left;) {
        program.moved = false;
        left = false;
        std::shuffle(warps.begin(), warps.end(), program.coin);
        for (int warp : warps) {
            if (program.coin() % 4 == 0) {  // this warp is late
                program.moved = true, left = true;
                continue;
            }
            for (int lane = 0; lane < 32; ++lane) {
                program.current = warp * 32 + lane;
                Fibre& fibre = program.fibres[program.current];
                program.inside = true;
                if (!fibre.done) swapcontext(&program.scheduler, &fibre.context);
                program.inside = false;
                if (program.failed) return false;
                left |= !fibre.done;
            }
        }
        for (size_t i = program.copies.size(); i-- > 0;)
            if (program.coin() % 8 == 0) deliver(i);
        if (!program.moved && !program.copies.empty()) deliver(program.coin() % program.copies.size());
        if (!program.moved && left) {
            std::fprintf(stderr, "all threads wait for ever\n");
            return false;
        }
    }
    bool whole = program.copies.empty();
    for (auto& fibre : program.fibres) whole &= fibre.groups.empty() && fibre.open.empty();
    if (!whole) std::fprintf(stderr, "a copy or a product is under way at the end\n");
    return whole;
}

// Everyone of `count` threads comes.
inline void meet(Meeting& meeting, u32 count, bool stay = true) {
    const u32 times = meeting.times;
    if (++meeting.here == count) meeting.here = 0, ++meeting.times;
    check(meeting.here < count, "more threads than a barrier is for");
    now->moved = true;
    if (stay) wait_until([&] { return meeting.times != times; });
}

// What every lane of the warp gives.
inline std::vector<u64> exchange(u64 value) {
    const int warp = now->current / 32;
    auto& lanes = now->lanes[warp];
    lanes.resize(64);
    const u32 half = now->warps[warp].times % 2 * 32;
    lanes[half + now->current % 32] = value;
    meet(now->warps[warp], 32);
    return {lanes.begin() + half, lanes.begin() + half + 32};
}

inline float fp8(u8 x) {
    const int exponent = x >> 3 & 15, mantissa = x & 7;
    check((x & 0x7F) != 0x7F, "an FP8 operand is no number");
    const float value = exponent ? std::ldexp(8 + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
    return x & 0x80 ? -value : value;
}

inline u8 to_fp8(float x) {
    check(!std::isnan(x), "FP8 of no number");
    const u8 sign = std::signbit(x) ? 0x80 : 0;
    x = std::fmin(std::fabs(x), 448.0f);
    if (x == 0) return sign;
    int exponent = std::fmax(std::ilogb(x), -6);
    int steps = (int)std::nearbyint(std::ldexp(x, 3 - exponent));
    if (steps == 16) steps = 8, ++exponent;
    return sign | (steps < 8 ? steps : (exponent + 7) << 3 | (steps - 8));
}

// Byte k of row n of a matrix descriptor.
inline u8 element(u64 matrix, int n, int k) {
    const u32 swizzle = matrix >> 62, stride = (matrix >> 32 & 0x3FFF) << 4, start = (matrix & 0x3FFF) << 4;
    const int row = swizzle == 1 ? 128 : swizzle == 2 ? 64 : (fail("a matrix must be swizzled by 128 or 64"), 0);
    const u32 at = start + n / 8 * stride + n % 8 * row + k;
    const u32 physical = at ^ (at >> 7 & (row / 16 - 1)) << 4;
    check(physical < BASE + SHARED, "a matrix lies outside of shared memory");
    return now->shared[physical];
}

// A warp's 16 rows of a product: 32 of K for all columns.
inline void multiply(int warp, size_t which) {
    Fibre* threads = &now->fibres[warp * 32];
    const Product first = threads[0].groups.front()[which];
    const int rows = warp % 4 * 16;
    static std::vector<double> b;
    b.resize(32 * first.columns);
    for (int n = 0; n < first.columns; ++n)
        for (int k = 0; k < 32; ++k) {
            const u8 x = element(first.b, n, k);
            b[k * first.columns + n] = first.int8 ? (double)(signed char)x : fp8(x);
        }
    for (int row = 0; row < 16; ++row) {
        double a[32];
        for (int k = 0; k < 32; ++k) {
            if (first.from_memory) {
                a[k] = (signed char)element(first.a, rows + row, k);
            } else {  // register (row / 8) + 2 (k / 16) of lane 4 (row % 8) + k % 16 / 4, byte k % 4
                const Fibre& owner = threads[row % 8 * 4 + k % 16 / 4];
                const u32 four = *owner.groups.front()[which].four[row / 8 + k / 16 * 2];
                const u8 x = four >> k % 4 * 8 & 0xFF;
                a[k] = first.int8 ? (double)x : fp8(x);
            }
        }
        for (int n = 0; n < first.columns; ++n) {
            double sum = 0;
            for (int k = 0; k < 32; ++k) sum += a[k] * b[k * first.columns + n];
            // column n of a row: register 4 (n / 8) + 2 (row / 8) + n % 2 of lane 4 (row % 8) + n % 8 / 2
            const Product& own = threads[row % 8 * 4 + n % 8 / 2].groups.front()[which];
            check(own.b == first.b && own.a == first.a && own.add == first.add, "threads differ about a product");
            const int place = n / 8 * 4 + row / 8 * 2 + n % 2;
            if (first.int8) {
                u32& to = ((u32*)own.sums)[place];
                to = (own.add ? to : 0) + (u32)(int64_t)sum;
            } else {
                float& to = ((float*)own.sums)[place];
                to = (own.add ? to : 0.0f) + (float)sum;
            }
        }
    }
}

}  // namespace machine

DEVICE int thread() { return machine::now->current; }
DEVICE int program() { return machine::now->index; }

DEVICE u32 shared_memory() { return machine::BASE; }

DEVICE void write_shared(u32 address, u32 value) {
    machine::check(address >= machine::BASE && address % 4 == 0 && address + 4 <= machine::BASE + machine::SHARED,
                   "a write outside of shared memory");
    std::memcpy(machine::now->shared.data() + address, &value, 4);
}

DEVICE u32 read_shared(u32 address) {
    u32 value;
    std::memcpy(&value, machine::now->shared.data() + address, 4);
    return value;
}

DEVICE void barrier_init(u32 at, u32 arrivals) { machine::now->barriers[at] = {arrivals, arrivals}; }

DEVICE void barrier_count(u32 at, u32 bytes) {
    auto& barrier = machine::barrier(at);
    machine::check(barrier.waiting > 0, "more arrivals than a barrier is for");
    barrier.bytes += bytes;
    --barrier.waiting;
    barrier.turn();
    machine::now->moved = true;
}

DEVICE void barrier_expect(u32 at, u32 bytes) { barrier_count(at, bytes); }
DEVICE void barrier_arrive(u32 at) {
    barrier_count(at, 0);
    if (machine::now->coin() % 8 == 0) machine::be_late(machine::now->coin() % 64);
}

DEVICE void barrier_wait(u32 at, u32 parity) {
    machine::wait_until([=] { return machine::barrier(at).odd != parity; });
}

DEVICE void copy_bulk(u32 to, const void* from, u32 bytes, u32 barrier) {
    machine::check(to % 16 == 0 && (u64)from % 16 == 0 && bytes % 16 == 0, "a bulk copy is of 16-byte pieces");
    machine::check(to >= machine::BASE && to + bytes <= machine::BASE + machine::SHARED, "a copy outside of memory");
    std::memset(machine::now->shared.data() + to, 0x7F, bytes);  // what is there is lost at once
    machine::now->copies.push_back({to, bytes, barrier, from});
}

DEVICE void publish() {}
DEVICE void synchronize() { machine::meet(machine::now->all, machine::now->fibres.size()); }

DEVICE void meet_warp() { machine::meet(machine::now->warps[machine::now->current / 32], 32); }

DEVICE bool one_lane() {
    meet_warp();
    return machine::now->current % 32 == 0;
}

DEVICE bool any_lane(bool x) {
    bool any = false;
    for (u64 lane : machine::exchange(x)) any |= lane;
    return any;
}

DEVICE int same_in_warp(int x) { return (int)machine::exchange(x)[0]; }
DEVICE u32 from_lane(u32 x, int distance) { return machine::exchange(x)[machine::now->current % 32 ^ distance]; }
DEVICE float from_lane(float x, int distance) { return as_float(from_lane((u32)as_int(x), distance)); }

DEVICE float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
DEVICE float larger(float a, float b) { return std::fmax(a, b); }
DEVICE u32 larger(u32 a, u32 b) { return (int)a > (int)b ? a : b; }
DEVICE float to_float(u32 x) { return (float)(int)x; }
DEVICE u32 add_bytes(u32 x, u32 sum) { return sum + (x & 255) + (x >> 8 & 255) + (x >> 16 & 255) + (x >> 24); }

DEVICE u32 pack_fp8(float a, float b, float c, float d) {
    using machine::to_fp8;
    return to_fp8(a) | to_fp8(b) << 8 | to_fp8(c) << 16 | (u32)to_fp8(d) << 24;
}

DEVICE u32 pack_bytes(float a, float b, float c, float d) {
    u32 packed = 0, shift = 0;
    for (float x : {a, b, c, d}) {
        const _Float16 half = (_Float16)x;
        u16 bits;
        std::memcpy(&bits, &half, 2);
        machine::check(bits <= 255, "a weight does not fit into a byte");
        packed |= (u32)bits << shift, shift += 8;
    }
    return packed;
}

template <int ROW_BYTES>
u64 descriptor(u32 address) {
    const u64 swizzle = ROW_BYTES == 128 ? 1 : 2;
    machine::check(address % (8 * ROW_BYTES) == 0, "a matrix starts where its swizzle repeats");
    return swizzle << 62 | (u64)(8 * ROW_BYTES >> 4) << 32 | (u64)(address >> 4);
}

DEVICE void products_begin() {}

DEVICE void products_commit() {
    auto& fibre = machine::now->fibres[machine::now->current];
    fibre.groups.push_back(std::move(fibre.open));
    fibre.open.clear();
    ++fibre.committed;
}

template <int GROUPS>
void products_wait() {
    const int mine = machine::now->current;
    auto* warpgroup = &machine::now->fibres[mine / 128 * 128];
    auto* warp = &machine::now->fibres[mine / 32 * 32];
    auto& fibre = machine::now->fibres[mine];
    const long wanted = fibre.committed - GROUPS;
    while (fibre.finished < wanted) {
        const long next = fibre.finished + 1;
        if (mine % 32 > 0) {  // the first lane does them for the others
            machine::wait_until([&] { return fibre.finished >= next; });
            continue;
        }
        machine::wait_until([&] {
            bool all = true;
            for (int i = 0; i < 128; ++i) all &= warpgroup[i].committed >= next;
            return all;
        });
        machine::be_late(machine::now->coin() % 8);
        for (size_t i = 0; i < fibre.groups.front().size(); ++i) machine::multiply(mine / 32, i);
        for (int i = 0; i < 32; ++i) warp[i].groups.pop_front(), ++warp[i].finished;
    }
}

template <class T, int N>
void settle(T (&)[N]) {}

template <int COUNT>
struct Columns {};

template <int COLUMNS, int N>
void multiply_scores(Columns<COLUMNS>, u32 (&scores)[N], u64 q, u64 k, bool add) {
    machine::now->fibres[machine::now->current].open.push_back({true, true, add, COLUMNS, q, k, {}, scores});
}

template <int COLUMNS, int N>
void multiply_bytes(Columns<COLUMNS>, u32 (&sums)[N], const u32& a, const u32& b, const u32& c, const u32& d, u64 v,
                    bool add) {
    machine::now->fibres[machine::now->current].open.push_back(
        {true, false, add, COLUMNS, 0, v, {&a, &b, &c, &d}, sums});
}

template <int COLUMNS, int N>
void multiply_fp8(Columns<COLUMNS>, u32 (&sums)[N], const u32& a, const u32& b, const u32& c, const u32& d, u64 v,
                  bool add) {
    machine::now->fibres[machine::now->current].open.push_back(
        {false, false, add, COLUMNS, 0, v, {&a, &b, &c, &d}, sums});
}
