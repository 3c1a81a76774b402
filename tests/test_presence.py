"""Attention that can be differentiated, and what the presence of every block does to a loss."""

import math

import pytest
import torch
from torch import Tensor

from paroattn.block_mask import BlockMask, blocks_of
from paroattn.grid import Grid, Layout, TextSpan
from paroattn.kernels.gradients import BLOCKS, gradients_on_gpu
from paroattn.kernels.presence import _by_block, attention_with_presence, gradients_of
from paroattn.kernels.reference import to_kernel_order

pytestmark = pytest.mark.usefixtures("one_thread")
LAYOUT = Layout(Grid(3, 5, 4), TextSpan(9, "prefix"))
BLOCK = (16, 8)
HEADS, DIM = 3, 24
ORDERS = ("HFW", "2x2x2", "FHW")


def tensors(count: int, batch=2, tokens=LAYOUT.tokens, heads=HEADS, dim=DIM, dtype=torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(batch, tokens, heads, dim, generator=generator, dtype=dtype) for _ in range(count)]


def random_mask(tokens=LAYOUT.tokens, heads=HEADS, block=BLOCK, density=0.5) -> Tensor:
    rows, columns = (blocks_of(tokens, size) for size in block)
    kept = torch.rand(heads, rows, columns, generator=torch.Generator().manual_seed(1)) < density
    kept[..., 0] = True
    return kept


def plain(q, k, v, kept: Tensor, order: Tensor, valid: Tensor | None, presence: Tensor | None = None) -> Tensor:
    """Dense attention, by element and head, with a factor on what each block adds to the softmax: (B, N, H, D)."""
    table, out = LAYOUT.table(ORDERS).long(), torch.empty_like(q)
    for element in range(len(q)):
        limit = LAYOUT.tokens if valid is None else LAYOUT.grid.tokens + int(valid[element])
        for head in range(q.shape[2]):
            index = table[order[head]]
            q_, k_, v_ = (x[element, index, head] for x in (q, k, v))
            factor = kept[head].to(q) if presence is None else presence[element, head]
            factor = factor.repeat_interleave(BLOCK[0], 0)[: len(q_)].repeat_interleave(BLOCK[1], 1)[:, : len(q_)]
            weights = (q_ @ k_.mT / math.sqrt(q.shape[-1])).exp() * factor
            weights = weights * (torch.arange(len(q_)) < limit)
            out[element, index, head] = weights @ v_ / weights.sum(-1, keepdim=True)
    return out


def run(q, k, v, kept, order, valid, gradient) -> Tensor:
    """Backward through the operation; the presences it notes."""
    noted: list[Tensor] = []
    mask = BlockMask.from_dense(kept, BLOCK)
    out = attention_with_presence(
        q, k, v, mask, noted.append, table=LAYOUT.table(ORDERS), order=order, text_tokens=9, valid_text=valid
    )
    (out * gradient).sum().backward()
    (presence,) = noted
    return presence


@pytest.mark.parametrize("valid", [None, torch.tensor([9, 4])], ids=["all text", "padded text"])
def test_gradients_are_those_of_masked_attention(valid):
    q, k, v, gradient = tensors(4)
    kept, order = random_mask(), torch.tensor([2, 0, 1])
    mine = [x.clone().requires_grad_() for x in (q, k, v)]
    run(*mine, kept, order, valid, gradient)
    wanted = [x.clone().requires_grad_() for x in (q, k, v)]
    (plain(*wanted, kept, order, valid) * gradient).sum().backward()
    for found, expected in zip(mine, wanted, strict=True):
        torch.testing.assert_close(found.grad, expected.grad, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("valid", [None, torch.tensor([9, 4])], ids=["all text", "padded text"])
def test_presence_is_what_a_block_changes_when_it_comes_or_goes(valid):
    q, k, v, gradient = tensors(4)
    kept, order = random_mask(), torch.tensor([2, 0, 1])
    presence = run(q, k, v, kept, order, valid, gradient)
    checked = 0
    for head in range(HEADS):
        for i in range(kept.shape[1]):
            for j in range(1, kept.shape[2]):
                changed = kept.clone()
                changed[head, i, j] ^= True
                states = [plain(q, k, v, each, order, valid) for each in (kept, changed)]
                sign = 1 if kept[head, i, j] else -1
                effect = sign * ((states[0] - states[1]) * gradient).sum((1, 2, 3))
                torch.testing.assert_close(presence[:, head, i, j].double(), effect, atol=1e-4, rtol=1e-3)
                checked += 1
                if checked % 3:
                    break
    assert checked > 20


def test_there_is_a_gradient_even_if_no_operand_has_one():
    q, k, v, gradient = tensors(4, dtype=torch.float32)
    presence = run(q, k, v, random_mask(), torch.zeros(HEADS, dtype=torch.int32), None, gradient)
    assert presence.shape == (2, HEADS, 5, 9) and presence.abs().min() >= 0 and presence.abs().max() > 0.1
    assert q.grad is None


def gradients_of_both(block, dim, tokens, device="cpu", dtype=torch.float32):
    """Pairs of what the kernels and plain PyTorch make of the same operands."""
    q, k, v, gradient = (
        x.transpose(1, 2).to(device, dtype).float().contiguous()
        for x in tensors(4, tokens=tokens, heads=2, dim=dim, dtype=torch.float32)
    )
    kept = random_mask(tokens, 2, block)
    mask, readable = BlockMask.from_dense(kept, block).to(device), torch.tensor([tokens, tokens - 23], device=device)
    allowed = kept.to(device).repeat_interleave(block[0], 1)[:, :tokens].repeat_interleave(block[1], 2)[..., :tokens]
    allowed = allowed & (torch.arange(tokens, device=device) < readable[:, None])[:, None, None]
    scores = (q @ k.mT / math.sqrt(dim)).masked_fill(~allowed, -math.inf)
    lse, centre = scores.logsumexp(-1), (scores.softmax(-1) @ v * gradient).sum(-1)
    arguments = (q, k, v, gradient, lse, centre, mask, 1 / math.sqrt(dim), readable)
    return zip(gradients_on_gpu(*arguments), gradients_of(*arguments), strict=True)


@pytest.mark.parametrize(("block", "dim", "tokens"), [((64, 64), 64, 200), ((128, 64), 40, 300), ((64, 128), 16, 130)])
def test_the_gpu_kernels_agree_with_plain_pytorch(block, dim, tokens):
    for found, expected in gradients_of_both(block, dim, tokens):
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [40, 64, 128])
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_on_a_gpu_they_agree_within_bf16(block, dim):
    for found, expected in gradients_of_both(block, dim, 600, "cuda", torch.bfloat16):
        assert (found - expected).norm() <= 1e-2 * expected.norm()


def test_gpu_kernels_refuse_blocks_they_do_not_know():
    q, k, v, gradient = (x.transpose(1, 2).contiguous() for x in tensors(4, dtype=torch.float32))
    rows = torch.zeros(q.shape[:3])
    with pytest.raises(ValueError, match=r"needs blocks of 64x64.*got 16x8 and 24"):
        gradients_on_gpu(q, k, v, gradient, rows, rows, BlockMask.from_dense(random_mask(), BLOCK), 1.0, None)


def test_a_row_without_keys_gives_nothing_to_anyone():
    q, k, v, gradient = tensors(4, batch=1, dtype=torch.float32)
    kept = random_mask()
    kept[:, 0] = False
    kept[:, 0, -1] = True  # text alone, all of it padding
    operands = [x.clone().requires_grad_() for x in (q, k, v)]
    presence = run(*operands, kept, torch.zeros(HEADS, dtype=torch.int32), torch.tensor([0]), gradient)
    assert presence.isfinite().all() and all(x.grad is not None and x.grad.isfinite().all() for x in operands)
    assert not presence[:, :, 0].any()
    order = torch.zeros(HEADS, dtype=torch.int64)
    first = to_kernel_order(operands[0].grad, LAYOUT.table(ORDERS), order)[:, :, : BLOCK[0]]
    assert not first.any()


def test_sums_by_block_take_a_ragged_tail():
    assert _by_block(torch.arange(7.0)[None], 3).tolist() == [[3.0, 12.0, 6.0]]
