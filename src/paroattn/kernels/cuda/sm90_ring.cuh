// What a program of sm90.cu works on, and the ring through which blocks of K and V reach it.
//
// A place of the ring is filled again as soon as it has been read: that of K when the scores are there, that of V when
// the block is done. So there is always more than a step's time for a copy to arrive. The first warp fills them.
//
// Q, K and V lie in global memory as in shared: rows of HEAD_DIM or KEYS bytes, their 16-byte pieces swizzled, a block
// without gaps. V's tokens are renamed so that a thread multiplies the p that it holds, as prepare.py says.
#pragma once

#include <sm90_ptx.cuh>

constexpr int ROWS = 64;
constexpr int THREADS = 128;
static_assert(STAGES >= 2, "a stage is filled again while another is read");
constexpr int Q_BYTES = ROWS * HEAD_DIM;
constexpr int K_BYTES = KEYS * HEAD_DIM;
constexpr int V_BYTES = HEAD_DIM * KEYS;
constexpr int ONES_BYTES = INT8_VALUES ? 0 : 8 * KEYS;  // further columns of V, which sum rows of P
constexpr int STAGE_BYTES = (K_BYTES + V_BYTES + ONES_BYTES + 1023) / 1024 * 1024;
constexpr int K_AT = (Q_BYTES + 1023) / 1024 * 1024;
constexpr int V_AT = K_AT + K_BYTES;
constexpr int ONES_AT = V_AT + V_BYTES;
constexpr int SCALE_BYTES = 16;  // the least that is copied; the first four are the scale
constexpr int V_SCALE_AT = K_AT + STAGES * STAGE_BYTES;
constexpr int V_SCALE_BYTES = 4 * HEAD_DIM;
constexpr int PLACES_AT = V_SCALE_AT + V_SCALE_BYTES;  // of rows in the model's order
constexpr int SCALES_AT = PLACES_AT + 4 * ROWS;
constexpr int BARRIERS_AT = SCALES_AT + SCALE_BYTES * STAGES;
constexpr int Q_FULL_AT = BARRIERS_AT + 32 * STAGES;

constexpr u32 ONES = 0x38383838;  // 1.0 in FP8

struct Arguments {
    const u8 *q, *k, *v;
    const float *q_scale, *k_scale, *v_scale, *shift;
    const u16 *lists;
    const int *counts;
    const u8 *bits;
    const int *tiles, *table, *order, *valid;
    void *out;
    float *lse;
    int batch, tokens, heads, channels, row_blocks, key_blocks, mask_bytes;
};

// What a program works on.
struct Work {
    int b, h, first;         // batch element, head, first query row
    u64 bh, q_row;           // head of all, row of q
    const u16* list;         // key blocks that it reads
    int next;                // the first of them, if there is one
    const int* places;       // of the head's rows in the model's order
    int count, whole, tail;  // how many, how many of them whole, real keys of the other
};

// What is read before, all that it can be at once: a read takes long, and barriers are made in the meantime.
struct Start {
    u32 part, b, h, row_block, tile, valid;
    u32 read[4];  // first key block, whole key blocks, eight bits of the mask with the last, order of the head

    DEVICE Start(const Arguments& a) {
        const u32 split = QUERIES / ROWS, pair = program() / split, row_blocks = a.row_blocks, batch = a.batch;
        const u32 group = pair / row_blocks, set = group / batch;
        part = program() % split;
        b = group - set * batch;
        tile = a.tiles[set * row_blocks + (pair - group * row_blocks)];
        valid = a.valid[b];
        h = tile / row_blocks;
        row_block = tile - h * row_blocks;
        read[0] = a.lists[(u64)tile * a.key_blocks];
        read[1] = a.counts[(u64)b * a.heads * row_blocks + tile];
        read[2] = a.bits[(u64)tile * a.mask_bytes + last() / 8];
        read[3] = a.order[h];
    }

    // The block with the last real key.
    DEVICE u32 last() const { return ((int)valid - 1) / KEYS; }
};

DEVICE Work work_of(const Arguments& a, Start& start) {
    settle(start.read);
    Work w;
    w.b = start.b;
    w.h = start.h;
    w.bh = (u64)w.b * a.heads + w.h;
    w.first = start.row_block * QUERIES + start.part * ROWS;
    w.q_row = w.bh * a.row_blocks * QUERIES + w.first;
    w.list = a.lists + (u64)start.tile * a.key_blocks;
    w.next = start.read[0];
    w.places = a.table + (u64)start.read[3] * a.tokens;
    w.tail = start.valid % KEYS;
    w.whole = start.read[1];
    w.count = w.whole + (w.tail > 0 ? start.read[2] >> start.last() % 8 & 1 : 0);
    return w;
}

// A stage of the ring, and whether it is being used for an odd time. K and V have barriers each.
struct Place {
    int stage = 0;
    u32 odd = 0;
    DEVICE void next() {
        if (++stage == STAGES) stage = 0, odd ^= 1;
    }
    DEVICE u32 keys_full(u32 memory) const { return memory + BARRIERS_AT + 8 * stage; }
    DEVICE u32 keys_empty(u32 memory) const { return keys_full(memory) + 8 * STAGES; }
    DEVICE u32 values_full(u32 memory) const { return keys_full(memory) + 16 * STAGES; }
    DEVICE u32 values_empty(u32 memory) const { return keys_full(memory) + 24 * STAGES; }
    DEVICE u32 at(u32 memory) const { return memory + stage * STAGE_BYTES; }
    DEVICE u32 scale(u32 memory) const { return memory + SCALES_AT + SCALE_BYTES * stage; }
};

// Fills the ring with block after block of the list, first its keys, later its values; the number of the next is asked
// for beforehand. A warp does it together, so that addresses are the same in all lanes, but for what one lane does.
struct Filler {
    const Arguments& a;
    const Work& w;
    const u32 memory;
    int next;
    u64 block = 0;

    DEVICE Filler(const Arguments& a, const Work& w, u32 memory) : a(a), w(w), memory(memory), next(w.next) {}

    // Q, and what the output needs of V.
    DEVICE void queries() {
        if (one_lane()) {
            const u32 full = memory + Q_FULL_AT;
            barrier_expect(full, Q_BYTES + V_SCALE_BYTES);
            copy_bulk(memory, a.q + w.q_row * HEAD_DIM, Q_BYTES, full);
            copy_bulk(memory + V_SCALE_AT, a.v_scale + w.bh * HEAD_DIM, V_SCALE_BYTES, full);
        }
    }

    DEVICE static Place place_of(int i) { return {i % STAGES, (u32)(i / STAGES & 1)}; }

    DEVICE void keys(int i) {
        if (i >= w.count) return;
        const Place place = place_of(i);
        block = w.bh * a.key_blocks + same_in_warp(next);
        if (i + 1 < w.count) next = w.list[i + 1];
        if (i >= STAGES) barrier_wait(place.keys_empty(memory), place.odd ^ 1);
        if (one_lane()) {
            const u32 full = place.keys_full(memory);
            barrier_expect(full, K_BYTES + SCALE_BYTES);
            copy_bulk(place.at(memory) + K_AT, a.k + block * K_BYTES, K_BYTES, full);
            copy_bulk(place.scale(memory), a.k_scale + 4 * block, SCALE_BYTES, full);
        }
    }

    // After the keys of this block and before those of the next.
    DEVICE void values(int i) {
        if (i >= w.count) return;
        const Place place = place_of(i);
        if (i >= STAGES) barrier_wait(place.values_empty(memory), place.odd ^ 1);
        if (one_lane()) {
            const u32 full = place.values_full(memory);
            barrier_expect(full, V_BYTES);
            copy_bulk(place.at(memory) + V_AT, a.v + block * V_BYTES, V_BYTES, full);
        }
    }
};

// Where one of a warp's 16 rows goes: asked for before the first copies, kept until the end.
struct RowPlace {
    int row, place = 0;
    DEVICE RowPlace(const Arguments& a, const Work& w) : row(thread() / 32 * 16 + thread() % 16) {
        if (w.first + row < a.tokens) place = w.places[w.first + row];
    }
    DEVICE void keep(u32 memory) const {
        if (thread() % 32 < 16) write_shared(memory + PLACES_AT + 4 * row, place);
    }
};

DEVICE void set_up(u32 memory) {
    if (thread() == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            const Place place{stage};
            for (u32 full : {place.keys_full(memory), place.values_full(memory)}) barrier_init(full, 1);
            for (u32 empty : {place.keys_empty(memory), place.values_empty(memory)}) barrier_init(empty, THREADS / 32);
        }
        barrier_init(memory + Q_FULL_AT, 1);
    }
    for (int i = thread(); i < STAGES * ONES_BYTES / 4; i += THREADS)
        write_shared(memory + ONES_AT + i / (ONES_BYTES / 4 + !ONES_BYTES) * STAGE_BYTES
                     + i % (ONES_BYTES / 4 + !ONES_BYTES) * 4, ONES);
    publish();
    synchronize();
}
