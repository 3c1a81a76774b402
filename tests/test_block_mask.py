"""Packing, lists, text and exports of block masks, checked against explicit loops."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from paroattn.block_mask import BlockMask, blocks_of, parse_block
from paroattn.kernels.reference import reference_attention
from paroattn.precision import Precision


def random_blocks(*shape: int, keep: float = 0.4, seed: int = 0) -> torch.Tensor:
    """Kept blocks, bool, with at least one block in every row."""
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(*shape, generator=generator) < keep
    chosen = torch.randint(shape[-1], shape[:-1], generator=generator)
    return kept.scatter(-1, chosen[..., None], True)


def test_bits_are_packed_lowest_first():
    kept = torch.zeros(1, 2, 11, dtype=torch.bool)
    kept[0, 0, [0, 1, 7, 8]] = True
    kept[0, 1, [4, 10]] = True
    mask = BlockMask.from_dense(kept, (64, 128))
    assert mask.bits.tolist() == [[[0b1000_0011, 0b001], [0b0001_0000, 0b100]]]
    assert (mask.heads, mask.query_blocks, mask.key_blocks, mask.block) == (1, 2, 11, (64, 128))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 8), (3, 5, 9), (2, 3, 4, 17), (2, 1, 2, 3, 33)])
def test_unpacking_gives_back_what_was_packed(shape):
    kept = random_blocks(*shape)
    mask = BlockMask.from_dense(kept, (64, 64))
    assert torch.equal(mask.dense(), kept)
    assert mask.heads == shape[-3]


def test_density_counts_kept_blocks_by_head():
    kept = random_blocks(2, 3, 5, 9)
    mask = BlockMask.from_dense(kept, (64, 64))
    expected = torch.tensor([[sum(map(sum, head)) / 45 for head in phase] for phase in kept.tolist()])
    torch.testing.assert_close(mask.head_density(), expected.double())
    assert mask.density == pytest.approx(expected.mean().item())


def test_a_full_mask_covers_ragged_tails_and_keeps_everything():
    mask = BlockMask.full(3, 130, (64, 32))
    assert mask.dense().shape == (3, 3, 5)
    assert mask.density == 1.0


def test_a_phase_and_a_device_keep_the_geometry():
    kept = random_blocks(2, 3, 5, 9)
    mask = BlockMask.from_dense(kept, (32, 64))
    assert torch.equal(mask[1].dense(), kept[1])
    assert (mask[1].key_blocks, mask[1].block) == (9, (32, 64))
    moved = mask.to("cpu")
    assert torch.equal(moved.bits, mask.bits)
    assert (moved.key_blocks, moved.block) == (9, (32, 64))


def test_key_lists_name_kept_blocks_in_rising_order_then_dropped_ones():
    kept = random_blocks(2, 3, 5, 11)
    counts, indices = BlockMask.from_dense(kept, (64, 64)).key_lists()
    assert counts.dtype == indices.dtype == torch.int32
    for phase, head, row in torch.cartesian_prod(*map(torch.arange, kept.shape[:3])).tolist():
        count, listed = int(counts[phase, head, row]), indices[phase, head, row].tolist()
        assert listed[:count] == kept[phase, head, row].nonzero().flatten().tolist()
        assert sorted(listed) == list(range(11))


@pytest.mark.parametrize("block", [(64, 64), (32, 64), (64, 32)], ids=str)
@pytest.mark.parametrize(("video", "text"), [(128, 64), (150, 7), (150, 100), (130, 1), (30, 300)])
def test_text_is_dense_from_the_block_where_it_meets_video(block, video, text):
    kept = random_blocks(2, 3, blocks_of(video, block[0]), blocks_of(video, block[1]))
    whole = BlockMask.from_dense(kept, block).with_text(video, text).dense()
    assert whole.shape == (2, 3, blocks_of(video + text, block[0]), blocks_of(video + text, block[1]))
    for row, column in torch.cartesian_prod(*map(torch.arange, whole.shape[2:])).tolist():
        only_video = (row + 1) * block[0] <= video and (column + 1) * block[1] <= video
        expected = kept[..., row, column] if only_video else torch.ones(2, 3, dtype=torch.bool)
        assert torch.equal(whole[..., row, column], expected), (row, column)


def test_no_text_leaves_a_mask_as_it_is():
    mask = BlockMask.full(2, 150, (64, 64))
    assert mask.with_text(150, 0) is mask


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("batch", [None, 2])
def test_flex_attention_under_the_exported_mask_equals_the_reference(batch):
    heads, tokens, block = 3, 150, (32, 64)
    mask = BlockMask.from_dense(random_blocks(heads, blocks_of(tokens, 32), blocks_of(tokens, 64), keep=0.3), block)
    assert mask.density < 0.8
    q, k, v = (torch.randn(batch or 1, tokens, heads, 16) for _ in range(3))
    valid = None if batch is None else torch.tensor([tokens, 131])
    if valid is not None:  # every row keeps a real key
        mask = BlockMask.from_dense(mask.dense() | (torch.arange(3) == 0), block)
    exported = mask.to_flex_attention(tokens, valid)
    assert exported.seq_lengths == (tokens, tokens)
    got = flex_attention(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=exported)
    expected, _ = reference_attention(
        q.double(), k.double(), v.double(),
        table=torch.arange(tokens, dtype=torch.int32)[None], order=torch.zeros(heads, dtype=torch.int32), mask=mask,
        precision=Precision.parse("fp64"), softmax_scale=0.25, valid_tokens=valid,
    )  # fmt: skip
    torch.testing.assert_close(got.transpose(1, 2).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch", [None, 2])
def test_the_blocks_that_flex_attention_visits_are_the_kept_ones(batch):
    kept = random_blocks(3, 5, 3)
    valid = None if batch is None else torch.tensor([150, 131])
    exported = BlockMask.from_dense(kept, (32, 64)).to_flex_attention(150, valid)
    assert torch.equal(exported.to_dense().bool(), kept[None].expand(batch or 1, -1, -1, -1))


def by_token(mask: BlockMask, tokens: int) -> torch.Tensor:
    """Which keys each query reads, (H, N, N)."""
    place = torch.arange(tokens)
    return mask.dense()[:, place // mask.block[0]][:, :, place // mask.block[1]]


def ragged_mask(block: tuple[int, int], tokens: int, heads=3) -> BlockMask:
    return BlockMask.from_dense(random_blocks(heads, *(blocks_of(tokens, size) for size in block)), block)


def test_launch_orders_start_with_the_densest_head_and_its_longest_rows_and_are_made_once():
    kept = torch.zeros(3, 4, 4, dtype=torch.bool)
    for head, lengths in enumerate([[1, 2, 1, 1], [2, 4, 1, 3], [3, 1, 1, 1]]):
        for row, length in enumerate(lengths):
            kept[head, row, :length] = True
    mask = BlockMask.from_dense(kept, (64, 64))
    assert mask.launch_order.tolist() == [5, 7, 4, 6, 8, 9, 10, 11, 1, 0, 2, 3]
    assert mask.launch_order.dtype == torch.int32
    assert mask.launch_order is mask.launch_order
    assert "launch_order" not in repr(mask)


@pytest.mark.parametrize("tokens", [384, 300, 257, 128, 70])
@pytest.mark.parametrize("fine", [(64, 64), (128, 64), (32, 128), (16, 8), (128, 128)], ids=str)
def test_finer_blocks_say_the_same_about_every_token(fine, tokens):
    mask = ragged_mask((128, 128), tokens)
    finer = mask.refine(fine, tokens)
    assert finer.block == fine
    assert (finer.query_blocks, finer.key_blocks) == tuple(blocks_of(tokens, size) for size in fine)
    assert torch.equal(by_token(finer, tokens), by_token(mask, tokens))
    finer.check()


def test_all_phases_are_refined_together():
    mask = BlockMask.from_dense(random_blocks(2, 3, 2, 3), (128, 64))
    finer = mask.refine((64, 32), 190)
    for phase in (0, 1):
        assert torch.equal(finer[phase].dense(), mask[phase].refine((64, 32), 190).dense())


@pytest.mark.parametrize("block", [(128, 64), (64, 48), (96, 32), (64, 256)], ids=str)
def test_coarser_or_crossing_blocks_are_no_refinement(block):
    with pytest.raises(ValueError, match=r"must divide 64×64; got .* Coarser blocks keep more .* make another plan"):
        ragged_mask((64, 64), 200).refine(block, 200)


def test_refining_needs_the_length_that_the_mask_covers():
    with pytest.raises(ValueError, match=r"cover 2×2 blocks of 128×128 for 250 tokens; got 3×3\. BlockMask\.with_text"):
        ragged_mask((128, 128), 300).refine((64, 64), 250)


@pytest.mark.parametrize(("capability", "block"), [((9, 0), (64, 128)), ((8, 9), (128, 64)), ((12, 0), (128, 64))])
@pytest.mark.parametrize("batch", [1, 2])
def test_sparge_attention_reads_the_kept_blocks(capability, block, batch):
    mask = ragged_mask(block, 300)
    exported = mask.to_sparge_attention(capability, batch)
    assert (exported.dtype, exported.is_contiguous()) == (torch.int8, True)
    assert torch.equal(exported.bool(), mask.dense()[None].expand(batch, -1, -1, -1))
    assert set(exported.unique().tolist()) == {0, 1}


def test_sparge_attention_gets_a_coarser_mask_after_refining_it():
    mask = ragged_mask((128, 128), 300)
    message = (
        r"SpargeAttn needs blocks of 64×128 on compute capability 9\.0; got 128×128\. Export mask\.refine\(\(64, 128\)"
    )
    with pytest.raises(ValueError, match=message):
        mask.to_sparge_attention((9, 0))
    assert mask.refine((64, 128), 300).to_sparge_attention((9, 0)).shape == (1, 3, 5, 3)
    with pytest.raises(
        ValueError, match=r"128×64 on compute capability 8\.9; got 64×64\. Make the plan with .* 128x64"
    ):
        ragged_mask((64, 64), 300).to_sparge_attention((8, 9))


@pytest.mark.parametrize("tokens", [384, 300, 100])
@pytest.mark.parametrize(("tile", "block"), [((128, 128), (128, 128)), ((128, 128), (256, 128)), ((64, 64), (64, 64))])
def test_flash_attention_4_lists_name_the_kept_blocks(tile, block, tokens):
    mask = ragged_mask(block, tokens)
    exported = mask.to_flash_attention_4(tile)
    assert exported["block_size"] == block
    assert not exported["mask_block_cnt"].any()
    for kind in ("full", "mask"):
        counts, indices = exported[f"{kind}_block_cnt"], exported[f"{kind}_block_idx"]
        assert counts.dtype == indices.dtype == torch.int32
        assert counts.shape == (1, 3, mask.query_blocks)
        assert indices.shape == (1, 3, mask.query_blocks, mask.key_blocks)
    rebuilt = torch.zeros_like(mask.dense())
    for head, row in torch.cartesian_prod(torch.arange(3), torch.arange(mask.query_blocks)).tolist():
        listed = exported["full_block_idx"][0, head, row, : exported["full_block_cnt"][0, head, row]].tolist()
        assert listed == sorted(listed)  # the kernel masks the ragged end of the last one only
        rebuilt[head, row, listed] = True
    assert torch.equal(rebuilt, mask.dense())


def test_flash_attention_4_takes_blocks_of_whole_tiles():
    with pytest.raises(
        ValueError, match=r"multiples of 128 tokens and key blocks of 128; got 64×64\. Make the plan with"
    ):
        ragged_mask((64, 64), 300).to_flash_attention_4()
    with pytest.raises(ValueError, match=r"multiples of 256 .* got 128×128\. Make the plan with blocks of 256x128"):
        ragged_mask((128, 128), 300).to_flash_attention_4((256, 128))
    with pytest.raises(
        ValueError, match=r"key blocks of 128; got 256×256\. Export mask\.refine\(\(128, 128\), tokens\)"
    ):
        ragged_mask((256, 256), 300).to_flash_attention_4()


@pytest.mark.parametrize("tokens", [384, 300, 257, 40])
@pytest.mark.parametrize("block", [(64, 128), (48, 32)], ids=str)
def test_flashinfer_s_blocks_cover_the_tokens_and_keep_what_is_kept(block, tokens):
    mask = ragged_mask(block, tokens)
    exported = mask.to_flashinfer(tokens)
    kept, rows, columns = (exported[name] for name in ("block_mask_map", "block_row_sz", "block_col_sz"))
    assert (kept.dtype, rows.dtype, columns.dtype) == (torch.bool, torch.int32, torch.int32)
    assert (rows.shape, columns.shape) == ((3, mask.query_blocks), (3, mask.key_blocks))
    for head in range(3):
        spread = kept[head].repeat_interleave(rows[head], 0).repeat_interleave(columns[head], 1)
        assert torch.equal(spread, by_token(mask, tokens)[head])


@pytest.mark.parametrize("tokens", [384, 320, 64])
def test_flashinfer_s_block_sparse_matrix_keeps_what_is_kept(tokens):
    mask = ragged_mask((48, 64), tokens)
    for head in range(3):
        exported = mask.to_flashinfer_bsr(tokens, head)
        indptr, indices = exported["indptr"], exported["indices"]
        assert indptr.dtype == indices.dtype == torch.int32
        assert (exported["M"], exported["N"], exported["R"], exported["C"]) == (tokens, tokens, 48, 64)
        dense = torch.zeros(mask.query_blocks, mask.key_blocks)
        for row, (first, last) in enumerate(zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True)):
            assert indices[first:last].tolist() == sorted(indices[first:last].tolist())
            dense[row, indices[first:last].long()] = 1
        assert torch.equal(dense.bool(), mask.dense()[head])
        assert len(indices) == indptr[-1]


def test_flashinfer_s_matrix_needs_whole_key_blocks_and_refining_gives_them():
    mask = ragged_mask((64, 64), 304)
    with pytest.raises(
        ValueError, match=r"multiple of the key block, 64; got 304\. Export mask\.refine\(\(64, 16\), 304\)"
    ):
        mask.to_flashinfer_bsr(304, 1)
    finer = mask.refine((64, 16), 304)
    exported = finer.to_flashinfer_bsr(304, 1)
    rows = torch.arange(finer.query_blocks).repeat_interleave(exported["indptr"].diff().long())
    dense = torch.zeros(5, 19).index_put((rows, exported["indices"].long()), torch.ones(()))
    spread = dense.bool().repeat_interleave(64, 0)[:304].repeat_interleave(16, 1)
    assert torch.equal(spread, by_token(mask, 304)[1])


@pytest.mark.parametrize(
    "export",
    [
        lambda mask: mask.to_sparge_attention((9, 0)),
        lambda mask: mask.to_flash_attention_4(),
        lambda mask: mask.to_flashinfer(100),
        lambda mask: mask.to_flashinfer_bsr(128, 0),
        lambda mask: mask.launch_order,
    ],
)
def test_exports_and_launch_orders_are_of_one_phase(export):
    with pytest.raises(ValueError, match=r"one phase's, \(H, Nq, Nk\); got 4 dimensions\. Use mask\[phase\]"):
        export(BlockMask.from_dense(torch.ones(2, 3, 1, 1, dtype=torch.bool), (128, 128)))


def test_flashinfer_exports_need_the_length_that_the_mask_covers():
    mask = ragged_mask((64, 64), 300)
    for export in (lambda: mask.to_flashinfer(330), lambda: mask.to_flashinfer_bsr(192, 0)):
        with pytest.raises(ValueError, match=r"the mask must cover .* blocks of 64×64 for .* tokens; got 5×5"):
            export()


@pytest.mark.parametrize(("text", "block"), [("64", (64, 64)), ("64x128", (64, 128)), ("1x9999", (1, 9999))])
def test_blocks_are_read_as_query_by_key(text, block):
    assert parse_block(text) == block


@pytest.mark.parametrize(
    "text", ["", "0", "64x", "x64", "64x0", "64X64", "64x64x64", "64 x 64", "064", "99999", "64\n"]
)
def test_malformed_blocks_are_refused(text):
    with pytest.raises(ValueError, match="QUERYxKEY in tokens, such as 64x64"):
        parse_block(text)


def test_a_row_without_blocks_is_refused_by_head_and_row():
    kept = torch.ones(2, 3, 4, 5, dtype=torch.bool)
    kept[1, 2, 3] = False
    with pytest.raises(ValueError, match="head 2, query block 3 keeps none"):
        BlockMask.from_dense(kept, (64, 64))


def test_bits_from_elsewhere_are_checked():
    mask = BlockMask.from_dense(random_blocks(2, 3, 5, 11), (64, 64))
    mask.check()
    empty, beyond = mask.bits.clone(), mask.bits.clone()
    empty[1, 2, 3] = 0
    beyond[0, 0, 0, 1] |= 0b1000
    with pytest.raises(ValueError, match="head 2, query block 3 keeps none"):
        BlockMask(empty, 11, (64, 64)).check()
    with pytest.raises(ValueError, match="bits beyond the 11 key blocks must be 0"):
        BlockMask(beyond, 11, (64, 64)).check()


def test_masks_of_another_kind_are_refused():
    with pytest.raises(ValueError, match=r"must be bool of shape .*; got torch.float32 of shape \(1, 2, 3\)"):
        BlockMask.from_dense(torch.ones(1, 2, 3), (64, 64))
    with pytest.raises(ValueError, match="must be bool of shape"):
        BlockMask.from_dense(torch.ones(2, 3, dtype=torch.bool), (64, 64))
    with pytest.raises(ValueError, match="packed bits must be uint8"):
        BlockMask(torch.ones(1, 2, 3, dtype=torch.int32), 20, (64, 64))
    with pytest.raises(ValueError, match="20 key blocks need 3 bytes a row; got 2"):
        BlockMask(torch.ones(1, 2, 2, dtype=torch.uint8), 20, (64, 64))


def test_text_needs_a_mask_over_exactly_the_video():
    with pytest.raises(ValueError, match="must cover 3×3 blocks of 64×64 tokens for 150 video tokens; got 2×2"):
        BlockMask.full(2, 128, (64, 64)).with_text(150, 7)
