// Block-sparse attention in four bits, on the matrix units of four bits that GPUs of capability 8 have.
//
// What is computed, and in which order tiles are launched, is what sparse.py says for INT4. A warp has 16 query rows;
// key blocks come through a ring of STAGES stages.
//
//     k     = 16 high + low + rest     high and low are shared by 32 keys: their products with q are one more tile of 8
//                                      columns, and where the scores of those keys start
//     p̂     two of them are rounded at once, in half precision, and eight fill the register in which the same thread
//           multiplies them next. A left operand wants eight neighbouring columns where an accumulator holds two, so
//           column 32 h + 16 s + 8 g + 2 t + i goes by the name 32 h + 8 t + 4 g + 2 i + s, and V's tokens are stored
//           under these names. Likewise channel 32 h + 8 t + 2 g + i of V is stored as 32 h + 8 g + 2 t + i, which
//           gives each thread eight neighbours of an output row.
//     Σ p̂   over runs of 16 keys is a product with ones and zeros; the sums are the left operand, in eight bits, of a
//           product with the middles of these runs, which is where the product with V starts
//
// A sum x of integers is held as BIAS + x, whose bits, read as a float, are 12582912 + x.
//
// Layout: two numbers to a byte, the first in the lower half. q (B, H, query tokens, D_PAD / 2); k (B, H, key blocks,
// KEYS + KEYS / 16, D_PAD / 2): rest of every key, then low and high of every 32 keys; v (B, H, key blocks, D_PAD,
// KEYS / 2 + 16): rest, then four words with the middles of two runs each in their lower bytes; the rest as in sparse.py.
//
// Macros: D channels, padded to D_PAD; KEYS of a key block; SPLIT programs for a query block; WARPS of a program;
// STAGES; PROGRAMS that share a multiprocessor; OUT_BITS of an output and whether they are OUT_BFLOAT16.
#include <warp.cuh>

constexpr int BIAS = 0x4B400000, MINUS_INFINITY = (int)0xFF800000;
constexpr float BIAS_AS_FLOAT = 12582912;
constexpr float HIGHEST = 15, HIGHEST_OF_EIGHT_BITS = 16 * HIGHEST;
constexpr float LOG2_OF_HIGHEST = 3.9068905956085187f, LN_2 = 0.6931471805599453f;
constexpr float STEEPEST = 10;  // already here nothing is left of smaller scores; beyond, `unit` leaves half precision
constexpr int THREADS = 32 * WARPS;
constexpr int RUNS = KEYS / 32;  // of keys that share high and low
constexpr int HALVES = KEYS / 64;  // of a key block: what one product of V's multiplies
constexpr u32 LEFT_OVER = 0x0F0F0F0F, EIGHT_TWICE = 0x00080008;
constexpr int TILE = 8;          // columns of an accumulator, rows of a right operand

// Rows of a right operand, CHUNKS times 16 bytes each, arranged so that a chunk of eight rows lies in different banks,
// as it does by itself where CHUNKS is odd: then the last one is left to its reader
template <int COUNT, int CHUNKS>
struct Rows {
    static constexpr int BYTES = COUNT * CHUNKS * 16, TILE_BYTES = TILE * CHUNKS * 16;
    static constexpr int PRODUCTS = CHUNKS / 2;   // instructions for the length of a row
    static constexpr int AT_ONCE = 2 / PRODUCTS;  // tiles that `load_matrices` brings

    static DEVICE int place(int row, int chunk) {
        return (row * CHUNKS + (CHUNKS % 2 ? chunk : chunk ^ row * CHUNKS / 8 % CHUNKS)) * 16;
    }

    // The row that a lane names for the first tiles; for others it lies TILE_BYTES further
    static DEVICE int named(int lane) {
        constexpr int READ = 2 * PRODUCTS;
        return place(lane % 8 + lane / 8 / READ * 8, lane / 8 % READ);
    }

    static DEVICE void fetch(char* to, const char* from) {
        int i = thread_in_block();
        to += place(i / CHUNKS, i % CHUNKS);  // THREADS chunks are a multiple of 8 rows: the places repeat
        from += i * 16;
        UNROLL
        for (int done = 0; done < COUNT * CHUNKS; done += THREADS)
            if (done + THREADS <= COUNT * CHUNKS || done + i < COUNT * CHUNKS)
                copy_async(to + done * 16, from + done * 16);
    }
};
using KeyRows = Rows<KEYS + 2 * RUNS, D_PAD / 32>;
using ValueRows = Rows<D_PAD, KEYS / 32 + 1>;
constexpr int STAGE_BYTES = KeyRows::BYTES + ValueRows::BYTES;

using Tile = int[4];   // accumulator: two columns of a lane's upper row, then of its lower row
using Left = u32[4];  // left operand: upper row, lower row, both again for the second half of 64 columns

// The online softmax of a row
struct Softmax {
    float m = -1e30f, total = 0;
    float scale, origin, old_share, share, start;
    u32 unit;

    // Go on to the next key block, by its largest score
    DEVICE void take(int largest, float block_scale) {
        float top = as_float(largest);
        scale = block_scale;
        float highest = (top - BIAS_AS_FLOAT) * scale, now = fmaxf(m, highest);
        old_share = exp2_fast(m - now);
        share = as_float(as_int(exp2_fast(highest - now)) & ~3);  // 22 bits, so that the next line is exact
        start = -BIAS_AS_FLOAT * share;
        m = now;
        scale = fminf(scale, STEEPEST);
        origin = -(top * scale);
        float one = HIGHEST_OF_EIGHT_BITS * exp2_fast(-fmaf(top, scale, origin));  // undoes what rounding did to origin
        unit = to_half(one, one);
    }
    DEVICE float weight(int score) const { return exp2_fast(fmaf(as_float(score), scale, origin)); }
    DEVICE float plus(float sum, int added) const { return fmaf(sum, old_share, fmaf(as_float(added), share, start)); }
};

// Scores of a key block for a warp's rows
DEVICE void multiply_keys(Tile (&s)[KEYS / TILE], const Left (&q)[KeyRows::PRODUCTS], const char* keys, int lane) {
    u32 parts[4];
    Tile middle = {BIAS, 0, BIAS, 0};  // low and high of a run: of the four lanes of a row, each has another
    load_matrices(parts, keys + KeyRows::place(KEYS + lane % 8 % (2 * RUNS), lane / 8 % (D_PAD / 32)));
    UNROLL
    for (int x = 0; x < KeyRows::PRODUCTS; x++) multiply(middle, middle, q[x], parts + 2 * x);
    Tile start[RUNS];
    UNROLL
    for (int run = 0; run < RUNS; run++) {
        start[run][0] = start[run][1] = shuffle(middle[0] + 16 * middle[1], lane / 4 * 4 + run);
        start[run][2] = start[run][3] = shuffle(middle[2] + 16 * middle[3], lane / 4 * 4 + run);
    }
    UNROLL
    for (int tile = 0; tile < KEYS / TILE; tile += KeyRows::AT_ONCE) {
        load_matrices(parts, keys + KeyRows::named(lane) + tile * KeyRows::TILE_BYTES);
        UNROLL
        for (int x = 0; x < 2; x++) {
            int part = x % KeyRows::PRODUCTS, each = tile + x / KeyRows::PRODUCTS;
            multiply(s[each], part ? s[each] : start[tile / 4], q[part], parts + 2 * x);
        }
    }
}

// The largest score of the upper row (0) or of the lower (1)
DEVICE int largest(const Tile (&s)[KEYS / TILE], int row) {
    int found = MINUS_INFINITY;  // biased scores are positive, so that integers compare as the floats do
    UNROLL
    for (int tile = 0; tile < KEYS / TILE; tile++) found = max(max(s[tile][2 * row], s[tile][2 * row + 1]), found);
    found = max(found, shuffle_xor(found, 1));
    return max(found, shuffle_xor(found, 2));
}

// Where the sums of `four_bits.round_weights` start, over 1024 in half precision: of an even tile's two columns in the
// upper row. Of an odd tile, or in the lower row, they are 8 off.
DEVICE u32 start_of_sums(int row, int column) {
    int first = 3 * row + 2 * column;
    return (first & 15) + ((first + 9 & 15) << 16) + 0x64006400;
}

// The weights of 64 keys of a row, which lie in eight tiles, rounded to four bits. The low bytes of their sums in half
// precision hold them modulo 16, and what is left. With the latter all ones, differences between steps lose nothing to
// the byte beside them but some of these ones.
DEVICE void round_weights(u32* p, const Tile* s, int row, const Softmax& softmax, u32 start) {
    u32 even = row ? start ^ EIGHT_TWICE : start, odd = even ^ EIGHT_TWICE, before = 0, grown[2];
    UNROLL
    for (int step = 0; step < 4; step++) {
        const int *x = s[2 * step] + 2 * row, *y = s[2 * step + 1] + 2 * row;
        even = fma_half(to_half(softmax.weight(x[0]), softmax.weight(x[1])), softmax.unit, even);
        odd = fma_half(to_half(softmax.weight(y[0]), softmax.weight(y[1])), softmax.unit, odd);
        u32 sums = pick_bytes(even, odd, 0x6420) | LEFT_OVER;
        grown[step % 2] = step ? sums - before + LEFT_OVER : sums;
        before = sums;
        if (step % 2) p[step / 2] = (grown[0] >> 4 & 0x0F0F0F0F) | (grown[1] & 0xF0F0F0F0);
    }
}

// Sums of p̂ over runs of 16 keys: of two runs, of the upper row and of the lower
DEVICE void add_up(Tile& sums, const Left (&p)[HALVES], const Tile& nothing, int lane) {
    UNROLL
    for (int half = 0; half < HALVES; half++) {
        int run = lane / 4 - 4 * half;
        u32 ones = run % 2 ? 0x10101010 : 0x01010101;
        const u32 members[2] = {run / 2 == 0 && run >= 0 ? ones : 0, run / 2 == 1 ? ones : 0};
        multiply_unsigned(sums, half ? sums : nothing, p[half], members);
    }
}

// Add the values of a key block to the output
DEVICE void add_values(float (&acc)[D_PAD / TILE][4], const Left (&p)[HALVES], const Tile& sums, const char* values,
                       const Softmax (&softmax)[2], const Tile& nothing, int lane) {
    const u32 of_runs[2] = {pick_bytes(sums[0], sums[1], 0x1140), pick_bytes(sums[2], sums[3], 0x1140)};
    UNROLL
    for (int four = 0; four < D_PAD / TILE; four += 4) {
        u32 middles[4];
        load_matrices(middles, values + ValueRows::place(lane, KEYS / 32) + four * ValueRows::TILE_BYTES);
        UNROLL
        for (int tile = four; tile < four + 4; tile += ValueRows::AT_ONCE) {
            u32 parts[4];
            Tile product[ValueRows::AT_ONCE];
            load_matrices(parts, values + ValueRows::named(lane) + tile * ValueRows::TILE_BYTES);
            UNROLL
            for (int x = 0; x < ValueRows::AT_ONCE; x++)
                multiply_bytes(product[x], nothing, of_runs, middles[tile - four + x]);
            UNROLL
            for (int x = 0; x < 2; x++) {
                int half = x % HALVES, each = x / HALVES;
                multiply_unsigned(product[each], product[each], p[half], parts + 2 * x);
            }
            UNROLL
            for (int x = 0; x < 4 * ValueRows::AT_ONCE; x++) {
                float& sum = acc[tile + x / 4][x % 4];
                sum = softmax[x % 4 / 2].plus(sum, product[x / 4][x % 4]);
            }
        }
    }
}

// Write eight neighbouring channels, or those that are left of them
DEVICE void store(void* out, long long start, const float (&x)[8], int left) {
    constexpr int EACH = 32 / OUT_BITS, COUNT = 8 / EACH;
    u32 words[COUNT];
    UNROLL
    for (int i = 0; i < COUNT; i++)
        words[i] = EACH == 1      ? as_int(x[i])
                   : OUT_BFLOAT16 ? to_bfloat16(x[2 * i], x[2 * i + 1])
                                  : to_half(x[2 * i], x[2 * i + 1]);
    char* to = (char*)out + start * (OUT_BITS / 8);
    if (D % 8 == 0) {
        UNROLL
        for (int i = 0; i < COUNT; i += 4)
            if (D == D_PAD || left > 0) store_words(to + 4 * i, words + i);
    } else {
        UNROLL
        for (int i = 0; i < 8; i++) {
            if (i >= left) continue;
            if (EACH == 1)
                ((u32*)to)[i] = words[i];
            else
                ((unsigned short*)to)[i] = words[i / EACH] >> 16 * (i % 2);
        }
    }
}

// Which rows of which head a lane works on
struct Place {
    int tile, b, h;
    int row;          // the upper one, in its head
    long long q_row;  // the same among those of all heads

    DEVICE Place(const int* tiles, int batch, int heads, int row_blocks) {
        int part = block_in_grid() % SPLIT, pair = block_in_grid() / SPLIT;
        tile = tiles[pair / (row_blocks * batch) * row_blocks + pair % row_blocks];  // head · row blocks + row block
        b = pair / row_blocks % batch, h = tile / row_blocks;
        row = ((tile % row_blocks * SPLIT + part) * WARPS + thread_in_block() / 32) * 16 + thread_in_block() % 32 / 4;
        q_row = (long long)(b * heads + h) * row_blocks * (SPLIT * WARPS * 16) + row;
    }
};

KERNEL(THREADS, PROGRAMS)
attend_int4(const u32* q, const char* k, const char* v, const float* q_scale, const float* k_scale,
            const float* v_scale, const float* shift, const short* lists, const int* counts,
            const unsigned char* bits, const int* tiles, const int* table, const int* order, const int* valid,
            void* out, float* lse, int batch, int tokens, int heads, int row_blocks, int key_blocks,
            int mask_bytes) {
    const Place at(tiles, batch, heads, row_blocks);
    int lane = thread_in_block() % 32, column = lane % 4;

    // Key blocks: whole ones, then the one in which the real tokens end, if it is kept
    const short* list = lists + (long long)at.tile * key_blocks;
    int first_block = (at.b * heads + at.h) * key_blocks;
    int whole = counts[at.b * heads * row_blocks + at.tile];
    int cut = valid[at.b] / KEYS, tail = valid[at.b] % KEYS;
    int count = whole + (tail > 0 ? bits[(long long)at.tile * mask_bytes + cut / 8] >> cut % 8 & 1 : 0);

    char* ring = shared_memory();
    auto fetch = [&](int i) {
        if (i < count) {
            char* stage = ring + i % STAGES * STAGE_BYTES;
            long long block = first_block + list[i];
            KeyRows::fetch(stage, k + block * KeyRows::BYTES);
            ValueRows::fetch(stage + KeyRows::BYTES, v + block * ValueRows::BYTES);
        }
        close_group();
    };
    UNROLL
    for (int i = 0; i < STAGES - 1; i++) fetch(i);

    Left query[KeyRows::PRODUCTS];
    UNROLL
    for (int x = 0; x < 4 * KeyRows::PRODUCTS; x++)
        query[x / 4][x % 4] = q[(at.q_row + x % 2 * 8) * (D_PAD / 8) + x / 2 * 4 + column];
    const float row_scales[2] = {q_scale[at.q_row], q_scale[at.q_row + 8]};
    const u32 start = start_of_sums(at.row, column);
    // Were it known to the compiler, it would be made anew for each product instead of kept in registers
    const int bias = at.row >= 0 ? BIAS : 0;
    const Tile nothing = {bias, bias, bias, bias};
    Softmax softmax[2];
    float acc[D_PAD / TILE][4] = {};
    float next_scale = count > 0 ? k_scale[first_block + list[0]] : 0;

    auto step = [&](int i, bool is_cut) {
        wait_for_groups<STAGES - 2>();
        barrier();  // all have this block, and none reads the one before any more
        fetch(i + STAGES - 1);
        const char* stage = ring + i % STAGES * STAGE_BYTES;
        float block_scale = next_scale;
        next_scale = k_scale[first_block + list[min(i + 1, count - 1)]];

        Tile s[KEYS / TILE];
        multiply_keys(s, query, stage, lane);
        if (is_cut) {
            int real = tail - 2 * column;
            UNROLL
            for (int x = 0; x < KEYS / 2; x++)
                if (x / 4 * TILE + x % 2 >= real) s[x / 4][x % 4] = MINUS_INFINITY;
        }
        UNROLL
        for (int r = 0; r < 2; r++) softmax[r].take(largest(s, r), row_scales[r] * block_scale);
        Left p[HALVES];
        UNROLL
        for (int half = 0; half < HALVES; half++) {
            u32 weights[2][2];
            UNROLL
            for (int r = 0; r < 2; r++) round_weights(weights[r], s + 8 * half, r, softmax[r], start);
            UNROLL
            for (int x = 0; x < 4; x++) p[half][x] = weights[x % 2][x / 2];
        }
        Tile sums;
        add_up(sums, p, nothing, lane);
        UNROLL
        for (int r = 0; r < 2; r++)
            softmax[r].total = softmax[r].plus(softmax[r].total, sums[2 * r] + (sums[2 * r + 1] - BIAS));
        add_values(acc, p, sums, stage + KeyRows::BYTES, softmax, nothing, lane);
    };
    for (int i = 0; i < whole; i++) step(i, false);
    if (whole < count) step(whole, true);

    float totals[2];
    UNROLL
    for (int r = 0; r < 2; r++) {
        float two = softmax[r].total + as_float(shuffle_xor(as_int(softmax[r].total), 1));
        totals[r] = two + as_float(shuffle_xor(as_int(two), 2));
    }
    const Place to(tiles, batch, heads, row_blocks);  // again, which is cheaper than to keep it
    UNROLL
    for (int r = 0; r < 2; r++) {
        int n = to.row + 8 * r;
        if (n >= tokens) continue;
        float total = totals[r], inverse = reciprocal_fast(fmaxf(total, 1e-30f));
        int position = table[(long long)order[to.h] * tokens + n];
        long long start = (((long long)to.b * tokens + position) * heads + to.h) * D;
        const float* scales = v_scale + (to.b * heads + to.h) * D_PAD;
        UNROLL
        for (int group = 0; group < D_PAD / 32; group++) {
            int channel = 32 * group + 8 * column;
            float x[8];
            UNROLL
            for (int c = 0; c < 8; c++)
                x[c] = acc[4 * group + c / 2][2 * r + c % 2] * inverse * scales[channel + c];
            store(out, start + channel, x, D - channel);
        }
        if (lse && column == 0) {
            float log = (softmax[r].m + log2_fast(total) - LOG2_OF_HIGHEST) * LN_2;
            log += shift[to.q_row + 8 * r];
            lse[(long long)(to.b * heads + to.h) * tokens + position] = total > 0 ? log : as_float(MINUS_INFINITY);
        }
    }
}
