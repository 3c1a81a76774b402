// A program of sm90.cu on a CPU, for tests: all programs of a grid, one after the other.
#include <sm90.cu>

extern "C" int emulate(int programs, unsigned seed, int threads, const u8* q, const u8* k, const u8* v,
                       const float* q_scale, const float* k_scale, const float* v_scale, const float* shift, const u16* lists,
                       const int* counts, const u8* bits, const int* tiles, const int* table, const int* order,
                       const int* valid, void* out, float* lse, int batch, int tokens, int heads, int channels,
                       int row_blocks, int key_blocks, int mask_bytes) {
    bool right = threads == THREADS && programs % CLUSTER == 0;
    for (int program = 0; right && program < programs; program += CLUSTER)
        right = machine::run(program, CLUSTER, THREADS, seed, [&] {
            sm90_attention(q, k, v, q_scale, k_scale, v_scale, shift, lists, counts, bits, tiles, table, order, valid,
                             out, lse, batch, tokens, heads, channels, row_blocks, key_blocks, mask_bytes);
        });
    return right ? Q_FULL_AT + 8 : -1;
}
