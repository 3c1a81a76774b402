// Block-sparse attention on sm_90a: INT8 Q·K, FP8 or INT8 P·V. What it computes is written down in ../reference.py.
//
// A program is a warpgroup, for 64 query rows, a query block or a part of one. Kept blocks of K and V reach it through a
// ring of STAGES (sm90_ring.cuh). Block after block, in base 2 (scales carry log2 e):
//
//     s = q kᵀ                            on matrix units; 12582912 is added, so that its bits read as a float
//     FP8   if any s·scale > m + 1:       m ← row maximum; what was added so far shrinks. Rare after the first blocks
//           p = exp2(s·scale − m) · 224
//     INT8  b = row maximum of s·scale; if any b > m + 64: m ← b, likewise
//           p = exp2(s·scale − b) · 255 · 2⁻²⁴, rounded to 2⁻²⁴: a byte; share = exp2(b − m)
//     acc, total += (p v, row sum of p) · share
// out = acc / total · v_scale
//
// FP8 rows are summed by eight further columns of ones.
#include <sm90_ring.cuh>

constexpr int SCORES = KEYS / 2;  // per thread, like all that follow
constexpr int OUT = HEAD_DIM / 2;
constexpr int SUMS = OUT + (INT8_VALUES ? 0 : 4);

constexpr u32 BIAS_BITS = 0x4B400000;
constexpr float BIAS = 12582912.0f;
constexpr float TOP = INT8_VALUES ? 7.994353436858858f : 7.807354922057604f;  // log2 255 and log2 224
constexpr float SLACK = INT8_VALUES ? 64.0f : 1.0f;
constexpr u32 LOWEST = 0xFF800000;  // −∞, and less than every biased score as an integer too
constexpr u32 HIDDEN = LOWEST - BIAS_BITS;

#if OUT_BYTES == 2
DEVICE u32 pack_output(float a, float b) { return OUT_IS_BF16 ? to_bfloat16(a, b) : to_half(a, b); }
#else
DEVICE u32 pack_output(float a, float b) { return 0; }
#endif

struct alignas(16) Piece {
    u32 x[4];
};

// The rows of a thread: 8 r + lane / 4, r = 0 and 1, of the 16 of its warp. It holds columns 8 c + 2 (lane % 4) + i of
// them in registers 4 c + 2 r + i.
struct Rows {
    float q_scale[2], m[2] = {-1e30f, -1e30f}, total[2] = {0, 0};
    float scale[2], origin[2], highest[2], share[2] = {1, 1}, shrink[2];
    u32 bytes[2];
    bool grown;

    // Scores → what their weights depend on: p = exp2(s · scale + origin).
    DEVICE void look(const u32 (&s)[SCORES], float k_scale) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            scale[r] = q_scale[r] * k_scale;
            u32 half[2] = {larger(s[2 * r], s[2 * r + 1]), larger(s[4 + 2 * r], s[5 + 2 * r])};
#pragma unroll
            for (int c = 2; c < SCORES / 4; ++c)
                half[c % 2] = larger(larger(half[c % 2], s[4 * c + 2 * r]), s[4 * c + 2 * r + 1]);
            u32 top = larger(half[0], half[1]) + BIAS_BITS;
            if (INT8_VALUES) top = row_maximum(top);
            highest[r] = (as_float(top) - BIAS) * scale[r];
        }
        if (!INT8_VALUES) grow();
#pragma unroll
        for (int r = 0; r < 2; ++r)
            origin[r] = (INT8_VALUES ? TOP - 24 - highest[r] : TOP - m[r]) - BIAS * scale[r];
    }

    // If a row is far above m, m becomes its maximum, and all before shrinks.
    DEVICE void grow() {
        shrink[0] = shrink[1] = 1;
        grown = any_lane(highest[0] > m[0] + SLACK || highest[1] > m[1] + SLACK);
        if (!grown) return;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float larger_m = larger(m[r], INT8_VALUES ? highest[r] : row_maximum(highest[r]));
            shrink[r] = exp2_fast(m[r] - larger_m);
            total[r] *= shrink[r];
            m[r] = larger_m;
        }
    }

    // INT8: the weights' part of the sums.
    DEVICE void add() {
        if (!INT8_VALUES) return;
        grow();
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            share[r] = exp2_fast(highest[r] - m[r]);
            total[r] = multiply_add(to_float(bytes[r]), share[r], total[r]);
        }
    }

    // Scores → p in 8 bits: of 32 keys, 2 h + r has columns 16 h + 8 g + 2 t + i of row r for bytes 2 g + i. Eight at a
    // time, so that the assembler mixes what they need with the exponentials of others.
    DEVICE void weigh(const u32 (&s)[SCORES], u32 (&p)[SCORES / 4]) {
        bytes[0] = bytes[1] = 0;
#pragma unroll
        for (int i = 0; i < SCORES; i += 8) {
            float x[8];
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                const int r = j / 2 % 2;
                x[j] = exp2_fast(multiply_add(as_float(s[i + j] + BIAS_BITS), scale[r], origin[r]));
            }
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                u32& four = p[i / 4 + r];
                four = pack(x[2 * r], x[2 * r + 1], x[4 + 2 * r], x[5 + 2 * r]);
                if (INT8_VALUES) bytes[r] = add_bytes(four, bytes[r]);
            }
        }
    }

    static DEVICE u32 pack(float a, float b, float c, float d) {
        return INT8_VALUES ? pack_bytes(a, b, c, d) : pack_fp8(a, b, c, d);
    }

    template <class T>
    static DEVICE T row_maximum(T x) {
        x = larger(x, from_lane(x, 1));
        return larger(x, from_lane(x, 2));
    }
};

struct Consumer {
    const Arguments& a;
    const Work& w;
    const u32 memory;
    Rows rows;
    float acc[SUMS];
    u32 sums[SUMS];  // products with V that are not yet in acc, floats for FP8
    u32 s[SCORES], p[SCORES / 4];

    DEVICE Consumer(const Arguments& a, const Work& w, u32 memory) : a(a), w(w), memory(memory) {
#pragma unroll
        for (int r = 0; r < 2; ++r) rows.q_scale[r] = a.q_scale[w.q_row + row() + 8 * r];
#pragma unroll
        for (int i = 0; i < SUMS; ++i) acc[i] = 0;
    }

    // The first row of this thread.
    static DEVICE int row() { return thread() / 32 * 16 + thread() % 32 / 4; }

    DEVICE void start_scores(const Place& at) {
        products_begin();
        const u64 q = descriptor<HEAD_DIM>(memory), k = descriptor<HEAD_DIM>(at.at(memory) + K_AT);
#pragma unroll
        for (int c = 0; c < HEAD_DIM / 32; ++c) multiply_scores(Columns<KEYS>(), s, q + 2 * c, k + 2 * c, c > 0);
        products_commit();
    }

    template <int N>
    DEVICE void start_values(u32 (&sums)[N], const Place& at) {
        products_begin();
        const u64 v = descriptor<KEYS>(at.at(memory) + V_AT);
#pragma unroll
        for (int c = 0; c < KEYS / 32; ++c) {
            const u32* four = p + 4 * c;
            if constexpr (INT8_VALUES)
                multiply_bytes(Columns<2 * SUMS>(), sums, four[0], four[1], four[2], four[3], v + 2 * c, c > 0);
            else
                multiply_fp8(Columns<2 * SUMS>(), sums, four[0], four[1], four[2], four[3], v + 2 * c, c > 0);
        }
        products_commit();
    }

    // Scores of keys that are not real.
    DEVICE void hide() {
#pragma unroll
        for (int i = 0; i < SCORES; ++i)
            if (i / 4 * 8 + thread() % 4 * 2 + i % 2 >= w.tail) s[i] = HIDDEN;
    }

    // What has been added in the scale of the new maxima.
    DEVICE void shrink() {
        if (!rows.grown) return;
#pragma unroll
        for (int d = 0; d < SUMS; ++d) acc[d] *= rows.shrink[d / 2 % 2];
    }

    // Products, complete, into acc.
    DEVICE void promote() {
#pragma unroll
        for (int d = 0; d < SUMS; ++d)
            acc[d] = multiply_add(INT8_VALUES ? to_float(sums[d]) : as_float(sums[d]), rows.share[d / 2 % 2], acc[d]);
    }

    // This warp has read what the barrier is for.
    DEVICE void release(u32 empty) {
        meet_warp();
        if (thread() % 32 == 0) barrier_arrive(empty);
    }

    // Read by the lane that says later that the warp has read it.
    DEVICE float k_scale(const Place& at) {
        return as_float(same_in_warp(thread() % 32 == 0 ? read_shared(at.scale(memory)) : 0));
    }

    // Block after block; while products run, what can be copied is.
    template <class KeysOf, class ValuesOf>
    DEVICE void work(KeysOf copy_keys, ValuesOf copy_values) {
        Place now;
        for (int i = 0; i < w.count; ++i, now.next()) {
            barrier_wait(now.keys_full(memory), now.odd);
            start_scores(now);
            copy_values(i + STAGES - 1);
            const float scale = k_scale(now);
            products_wait<0>();
            settle(s);
            release(now.keys_empty(memory));
            if (i == w.whole) hide();
            rows.look(s, scale);
            rows.weigh(s, p);
            barrier_wait(now.values_full(memory), now.odd);
            start_values(sums, now);
            copy_keys(i + STAGES);
            rows.add();
            shrink();
            products_wait<0>();
            settle(sums);
            release(now.values_empty(memory));
            promote();
        }
    }

    // acc / total to its places in the model's order.
    DEVICE void finish() {
        const int quad = thread() % 4, first = row();
        float totals[2], inverse[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float total = rows.total[r];
            if constexpr (INT8_VALUES) {
                total += from_lane(total, 1);
                total += from_lane(total, 2);
            } else {
                total = acc[OUT + 2 * r];
            }
            totals[r] = total;
            inverse[r] = reciprocal_fast(larger(total, 1e-30f));
        }
#pragma unroll
        for (int d = 0; d < OUT; d += 4) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float v_scale = as_float(read_shared(memory + V_SCALE_AT + 4 * (2 * d + 2 * quad + i)));
                acc[d + i] *= inverse[0] * v_scale;
                acc[d + 2 + i] *= inverse[1] * v_scale;
            }
        }
        meet_warp();  // others of it kept the places
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float total = totals[r];
            const bool real = w.first + first + 8 * r < a.tokens;
            const int place = real ? (int)read_shared(memory + PLACES_AT + 4 * (first + 8 * r)) : 0;
            const u64 at = (((u64)w.b * a.tokens + place) * a.heads + w.h) * a.channels;
            if (OUT_BYTES == 2 && a.channels % 8 == 0)
                store_pieces(at, r, quad, real);
            else
                store_each(at, r, quad, real);
            if (a.lse && real && quad == 0) {
                float lse = (rows.m[r] + log2_fast(larger(total, 1e-30f)) - TOP) * 0.6931471805599453f;
                if (a.shift) lse += a.shift[w.q_row + first + 8 * r];
                a.lse[w.bh * a.tokens + place] = total > 0 ? lse : as_float(LOWEST);
            }
        }
    }

    // Eight channels at once: of four groups of eight, each lane of a quad gathers one.
    DEVICE void store_pieces(u64 at, int r, int quad, bool real) {
        const bool odd = quad & 1, upper = quad & 2;
#pragma unroll
        for (int c = 0; c < HEAD_DIM / 8; c += 4) {
            u32 x[4];
#pragma unroll
            for (int j = 0; j < 4; ++j) x[j] = pack_output(acc[4 * (c + j) + 2 * r], acc[4 * (c + j) + 2 * r + 1]);
            const u32 near[2] = {from_lane(odd ? x[0] : x[1], 1), from_lane(odd ? x[2] : x[3], 1)};
            u32 even_lane[2] = {odd ? near[0] : x[0], odd ? near[1] : x[2]};  // of groups 0 or 1, of 2 or 3
            u32 odd_lane[2] = {odd ? x[1] : near[0], odd ? x[3] : near[1]};
            const u32 far[2] = {from_lane(upper ? even_lane[0] : even_lane[1], 2),
                                from_lane(upper ? odd_lane[0] : odd_lane[1], 2)};
            Piece piece;
            piece.x[0] = upper ? far[0] : even_lane[0];
            piece.x[1] = upper ? far[1] : odd_lane[0];
            piece.x[2] = upper ? even_lane[1] : far[0];
            piece.x[3] = upper ? odd_lane[1] : far[1];
            const int channel = 8 * (c + quad);
            if (real && channel < a.channels) *(Piece*)((u16*)a.out + at + channel) = piece;
        }
    }

    DEVICE void store_each(u64 at, int r, int quad, bool real) {
#pragma unroll
        for (int d = 0; d < OUT; ++d) {
            const int channel = d / 4 * 8 + 2 * quad + d % 2;
            if (d / 2 % 2 != r || !real || channel >= a.channels) continue;
            if constexpr (OUT_BYTES == 4)
                ((float*)a.out)[at + channel] = acc[d];
            else
                ((u16*)a.out)[at + channel] = (u16)pack_output(acc[d], 0);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, PROGRAMS) sm90_attention(
    const u8* q, const u8* k, const u8* v, const float* q_scale, const float* k_scale, const float* v_scale,
    const float* shift, const u16* lists, const int* counts, const u8* bits, const int* tiles, const int* table,
    const int* order, const int* valid, void* out, float* lse, int batch, int tokens, int heads, int channels,
    int row_blocks, int key_blocks, int mask_bytes) {
    const Arguments a{q, k, v, q_scale, k_scale, v_scale, shift, lists, counts, bits, tiles, table, order, valid, out,
                      lse, batch, tokens, heads, channels, row_blocks, key_blocks, mask_bytes};
    const u32 memory = shared_memory();
    Start start(a);
    set_up(memory);
    const Work w = work_of(a, start);
    Filler filler(a, w, memory);
    const bool fills = same_in_warp(thread() / 32) == 0;
    const auto copy_keys = [&](int i) { if (fills) filler.keys(i); };
    const auto copy_values = [&](int i) { if (fills) filler.values(i); };
    const RowPlace place(a, w);
    if (fills) filler.queries();
    for (int i = 0; i < STAGES; ++i) {
        copy_keys(i);
        if (i + 1 < STAGES) copy_values(i);
    }
    Consumer consumer(a, w, memory);
    place.keep(memory);
    barrier_wait(memory + Q_FULL_AT, 0);
    consumer.work(copy_keys, copy_values);
    consumer.finish();
}
