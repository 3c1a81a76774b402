"""Attention over kept blocks: laws of the operation, the reference against loops, the CPU path against that."""

import gc
import math
import weakref
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

import paroattn
from paroattn.block_mask import BlockMask, blocks_of
from paroattn.grid import ORDERS, Grid, Layout, TextSpan
from paroattn.kernels import attention as public
from paroattn.kernels import cpu, four_bits, library, reference
from paroattn.precision import Precision

GRID = Grid(3, 5, 7)
ORDERED = (*ORDERS, "2x2x4")
HEADS = 5
TEXTS = [TextSpan(), TextSpan(23, "prefix"), TextSpan(23, "suffix")]
BLOCKS = [(16, 16), (32, 16), (16, 32), (64, 64)]
NO_TEXT = TextSpan()


@pytest.fixture(autouse=True)
def small_tensors(monkeypatch):
    """One thread, since threads would mostly wait for each other, and chunks that hold several unequal pairs."""
    monkeypatch.setattr(cpu, "CHUNKS_PER_THREAD", 1)
    monkeypatch.setattr(cpu, "SHORTEST_SHARE", 0.5)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Case:
    """Inputs that differ in every head, token, channel and batch element, with another order and mask per head."""

    def __init__(self, text=NO_TEXT, block=(16, 16), padded=False, keep=0.4, dtype=torch.float64, seed=0, dim=24):
        generator = torch.Generator().manual_seed(seed)
        self.layout = Layout(GRID, text)
        tokens = self.layout.tokens
        shape = (2, tokens, HEADS, dim)
        q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
        levels = torch.linspace(0.5, 2.0, HEADS)[:, None] * torch.linspace(0.8, 1.2, dim)
        self.q, self.k = (2 * q * levels).to(dtype), (k + torch.randn(HEADS, dim, generator=generator)).to(dtype)
        self.v = (v + levels).to(dtype)
        self.table = self.layout.table(ORDERED)
        self.order = torch.tensor([6, 2, 0, 5, 3], dtype=torch.int32)
        blocks = [blocks_of(GRID.tokens, size) for size in block]
        kept = torch.rand(HEADS, *blocks, generator=generator) < keep
        kept.scatter_(-1, torch.randint(blocks[1], (HEADS, blocks[0], 1), generator=generator), True)
        kept[1, 0] = False
        kept[1, 0, -1] = True  # one kept block, the ragged one
        kept[2] = True  # a dense head
        kept[3, :1] = True  # a dense row
        self.mask = BlockMask.from_dense(kept, block).with_text(GRID.tokens, text.tokens)
        self.text_tokens = text.tokens
        self.valid_text: Any = torch.tensor([text.tokens - 4, 3]) if padded else None
        self.valid = (
            [tokens - text.tokens + int(n) for n in self.valid_text] if self.valid_text is not None else [tokens] * 2
        )

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    def attention(self, **changes):
        settings = {"table": self.table, "order": self.order, "text_tokens": self.text_tokens}
        settings |= {"valid_text": self.valid_text, "return_lse": True} | changes
        return paroattn.attention(*self.qkv, self.mask, **settings)

    def kernel_order(self, head: int) -> Tensor:
        return self.table[int(self.order[head])].long()

    def token_mask(self, head: int, element: int) -> Tensor:
        """Keys that each query may read, (N, N) in kernel order, spelled out."""
        tokens = torch.arange(self.layout.tokens)
        kept = self.mask.dense()[head][tokens // self.mask.block[0]][:, tokens // self.mask.block[1]]
        return kept & (tokens < self.valid[element])


def each_head(case: Case, one_head) -> tuple[Tensor, Tensor]:
    """Out and lse in the model's order from a function of (q, k, v, token mask, valid) of one head in kernel order."""
    out, lse = torch.empty_like(case.q), torch.empty(2, HEADS, case.layout.tokens, dtype=torch.float64)
    for element in range(2):
        for head in range(HEADS):
            index = case.kernel_order(head)
            q, k, v = (x[element, :, head][index] for x in case.qkv)
            result, logs = one_head(q, k, v, case.token_mask(head, element), case.valid[element])
            out[element, index, head], lse[element, head, index] = result, logs
    return out, lse


def exact(case: Case) -> tuple[Tensor, Tensor]:
    """Dense softmax under the token mask."""

    def one_head(q, k, v, allowed, valid):
        scores = (q @ k.T / math.sqrt(q.shape[1])).masked_fill(~allowed, -math.inf)
        return scores.softmax(-1) @ v, scores.logsumexp(-1)

    return each_head(case, one_head)


def quantised(case: Case, qk: str, pv: str) -> tuple[Tensor, Tensor]:
    """One block after the other with an online softmax, every scale spelled out."""
    top = {"int8": 127, "fp8": 448}
    (rows, columns), scale = case.mask.block, 1 / math.sqrt(case.q.shape[-1])

    def rotated(x: Tensor) -> Tensor:
        size = 1 << (x.shape[1] - 1).bit_length()
        signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(x.shape[1])]
        return x @ torch.tensor(signs, dtype=x.dtype) / math.sqrt(size)

    def stored(x: Tensor, form: str, highest: int) -> Tensor:
        return x.to(torch.float8_e4m3fn).to(x.dtype) if form == "fp8" else x.round().clamp(-highest, highest)

    def rounded(parts: list[Tensor], form: str) -> list[Tensor]:
        scales = [max(part.abs().max().item() / top[form], 1e-12) for part in parts]
        return [stored(part / size, form, top[form]) * size for part, size in zip(parts, scales, strict=True)]

    def one_head(q, k, v, allowed, valid):
        real = (torch.arange(len(q)) < valid)[:, None]
        mean, v = torch.zeros_like(k[0]), v * real
        q_hat, k_hat, v_hat = q, k, v
        if qk in top or qk == "int4":
            mean = k[:valid:8].mean(0)
            q_hat, k_hat = rotated(q), rotated((k - mean) * real)
        if qk in top:
            q_hat, k_hat = (torch.cat(rounded(list(x.split(size)), qk)) for x, size in ((q_hat, 1), (k_hat, columns)))
        elif qk == "int4":
            q_, k_, video = q_hat, k_hat, len(q) - case.text_tokens
            q_hat, k_hat = four_bit_rows(q_, k_, valid), four_bit_keys(k_, q_[:valid], columns)
            text = video // columns * columns if case.text_tokens else video
            q_hat[video:] = torch.cat([*rounded(list(q_[video:].split(1)), "int8"), q_[:0]])
            k_hat[text:] = torch.cat([*rounded(list(k_[text:].split(columns)), "int8"), k_[:0]])
        if pv in top:
            v_hat = torch.cat(rounded(list(v.split(1, 1)), pv), 1)
        elif pv == "int4":
            v_hat = four_bit_values(v)
        p_top = {"int8": 255, "fp8": 448, "int4": 15}.get(pv, 1)
        out, lse = torch.empty_like(q), torch.empty_like(q[:, 0])
        for i in range(0, len(q), rows):
            queries = q_hat[i : i + rows]
            acc, total = torch.zeros_like(q[i : i + rows]), torch.zeros(len(queries), 1).double()
            highest = torch.tensor(-1e30)
            for j in range(0, valid, columns):
                if not allowed[i, j]:
                    continue
                keys = slice(j, min(j + columns, valid))
                s = queries @ k_hat[keys].T * scale
                new = torch.maximum(highest, s.amax(1, keepdim=True))
                b = new if pv == "fp8" else s.amax(1, keepdim=True)
                exact = (s - b).exp() * p_top
                p = four_bit_weights(exact) if pv == "int4" else stored(exact, pv, p_top) if pv in top else exact
                old, share = (highest - new).exp(), (b - new).exp() / p_top
                summed = (exact if pv == "fp8" else p).sum(1, True)
                acc, total, highest = acc * old + p @ v_hat[keys] * share, total * old + summed * share, new
            out[i : i + rows] = acc / total
            lse[i : i + rows] = (highest + total.log())[:, 0] + queries.new_tensor(scale) * (q[i : i + rows] @ mean)
        return out, lse

    return each_head(case, one_head)


def fed_back(wanted: Tensor, other: Tensor) -> Tensor:
    """Integers −8…7 for (n, D): 16 channels at a time from the last, the rest of a least-squares problem in those left.

    Given what the channels after a group err, the group's best target is where Σ (error · other)² is least.
    """
    size, moments = wanted.shape[1], other.T @ other
    moments = moments + 0.1 * moments.diagonal().mean() * torch.eye(size)
    errors, out = torch.zeros_like(wanted), torch.zeros_like(wanted)
    for start in range(size - 16, -1, -16):
        free, done = slice(0, start + 16), slice(start + 16, size)
        best = -errors[:, done] @ torch.linalg.solve(moments[free, free], moments[free, done]).T
        group = slice(start, start + 16)
        out[:, group] = (wanted[:, group] + best[:, group]).round().clamp(-8, 7)
        errors[:, group] = out[:, group] - wanted[:, group]
    return out


def four_bit_rows(q: Tensor, k: Tensor, valid: int) -> Tensor:
    scale = q.abs().amax(1, keepdim=True) * 0.95 / 7
    return fed_back(q / scale, k[:valid:16]) * scale


def four_bit_keys(k: Tensor, real_queries: Tensor, columns: int) -> Tensor:
    blocks = []
    run = min(columns, 32)
    for block in pad(k, (0, 0, 0, -len(k) % columns)).split(columns):
        middles = [(part.amax(0) + part.amin(0)) / 2 for part in block.split(run)]
        middle = torch.stack(middles).repeat_interleave(run, 0)
        scale = max((block - middle).abs().max() * 0.9 / 7, middle.abs().max() / 119)
        steps = (middle / scale).round()
        blocks.append((steps + fed_back(block / scale - steps, real_queries[::16])) * scale)
    return torch.cat(blocks)[: len(k)]


def four_bit_values(v: Tensor) -> Tensor:
    """The middle of every 16 tokens in whole steps, and four bits that make up for what those before them err."""
    runs = [torch.cat([run, run.new_zeros(16 - len(run), run.shape[1])]) for run in v.split(16)]
    middles = [(run.amax(0) + run.amin(0)) / 2 for run in runs]
    farthest = torch.stack([run - middle for run, middle in zip(runs, middles, strict=True)]).abs().amax((0, 1))
    scale = torch.maximum(0.8 * farthest / 7, torch.stack(middles).abs().amax(0) / 119)
    out = []
    for run, middle in zip(runs, middles, strict=True):
        middle, errors = (middle / scale).round(), []
        for n, row in enumerate(run / scale - middle):
            owed = 0.25 * sum(errors) + (0.2 * errors[n - 4] if n >= 4 else 0)
            errors.append((row - owed).round().clamp(-8, 7) - row)
            out.append(middle + row + errors[-1])
    return torch.stack(out)[: len(v)] * scale


def four_bit_weights(p: Tensor) -> Tensor:
    """Every 16th key of 64 takes over what is left of the one before, in sixteenths; the first 16 of a row, 0 to 15."""
    out, left = torch.empty_like(p), {}
    for n in range(p.shape[1]):
        begin = [(9 * n + 3 * row) % 16 for row in range(len(p))]
        sixteenths = (16 * p[:, n]).round() + (torch.tensor(begin) if n % 64 < 16 else left[n - 16])
        out[:, n] = sixteenths // 16
        left[n] = sixteenths % 16
    return out


def torch_attention(case: Case, dtype: torch.dtype) -> Tensor:
    """What PyTorch computes for the same inputs at a precision."""

    def one_head(q, k, v, allowed, valid):
        q, k, v = (x.to(dtype)[None, None] for x in (q, k, v))
        result = scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        return result[0, 0].to(case.q.dtype), torch.zeros(len(allowed), dtype=torch.float64)

    return each_head(case, one_head)[0]


def error(got: Tensor, expected: Tensor) -> float:
    return (got.double() - expected.double()).pow(2).mean().sqrt().item()


def sqnr(got: Tensor, expected: Tensor) -> float:
    """Signal over quantisation noise, dB."""
    return 20 * math.log10(expected.double().pow(2).mean().sqrt().item() / error(got, expected))


def close(got, expected, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=tolerance)


LAYOUTS = [(text, padded) for text in TEXTS for padded in (False, True) if text.tokens or not padded]
layouts = pytest.mark.parametrize(
    ("text", "padded"),
    LAYOUTS,
    ids=lambda x: x.side * bool(x.tokens) or "video" if isinstance(x, TextSpan) else ["", "padded"][x],
)
blocks = pytest.mark.parametrize("block", BLOCKS, ids="{0[0]}x{0[1]}".format)
both = pytest.mark.parametrize("impl", ["cpu", "reference"])


@layouts
@blocks
def test_the_reference_is_a_softmax_over_the_kept_tokens(text, padded, block):
    case = Case(text, block, padded)
    out, lse = case.attention()
    expected, expected_lse = exact(case)
    close(out, expected)
    close(lse, expected_lse)


@layouts
@blocks
def test_the_cpu_path_is_as_exact_as_pytorch_in_float32(text, padded, block):
    case = Case(text, block, padded)
    expected, expected_lse = exact(case)
    allowed = error(torch_attention(case, torch.float32), expected)
    single = Case(text, block, padded, dtype=torch.float32)
    out, lse = single.attention(impl="cpu")
    assert out.dtype == lse.dtype == torch.float32
    assert error(out, expected) <= 2 * allowed
    close(lse.double(), expected_lse, 5e-6)
    close(single.attention(impl="cpu", return_lse=False), out, 1e-5)
    reference_out, reference_lse = single.attention(impl="reference")
    close(out, reference_out, 1e-5)
    close(lse, reference_lse, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_exact_as_pytorch(dtype):
    case = Case(TEXTS[1], (32, 16), True, dtype=dtype)
    rounded = Case(TEXTS[1], (32, 16), True)
    rounded.q, rounded.k, rounded.v = (x.double() for x in case.qkv)
    expected, _ = exact(rounded)
    out, lse = case.attention()
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert error(out, expected) <= 2 * error(torch_attention(rounded, dtype), expected)


@pytest.mark.parametrize(("impl", "dtype"), [("cpu", torch.float32), ("reference", torch.float64)])
def test_density_one_equals_dense_attention_whatever_the_orders(impl, dtype):
    case = Case(TEXTS[1], (32, 16), dtype=dtype)
    case.mask = BlockMask.full(HEADS, case.layout.tokens, (32, 16))
    out, _ = case.attention(impl=impl)
    dense = scaled_dot_product_attention(*(x.transpose(1, 2) for x in case.qkv)).transpose(1, 2)
    close(out, dense, 1e-12 if dtype == torch.float64 else 2e-5)


@both
def test_without_a_table_every_head_reads_in_the_model_s_order(impl):
    case = Case(dtype=torch.float32)
    own = torch.arange(case.layout.tokens, dtype=torch.int32)[None]
    out, _ = case.attention(impl=impl, table=None, order=None)
    assert torch.equal(out, case.attention(impl=impl, table=own, order=torch.zeros(HEADS, dtype=torch.int64))[0])


@both
@pytest.mark.parametrize("order", ORDERED)
@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_a_token_reads_its_own_block_of_its_head_s_order(impl, order, text):
    """Values are coordinates, keys are all alike: the result is the mean coordinate of the block."""
    layout, size = Layout(GRID, text), 16
    place = torch.arange(layout.tokens, dtype=torch.float32)
    values = torch.stack([place, place**2 / 100, place % 7, place % 3], -1)[None, :, None].repeat(1, 1, 2, 1)
    values[:, :, 1] *= -1
    count = blocks_of(layout.tokens, size)
    mask = BlockMask.from_dense(torch.eye(count).bool().repeat(2, 1, 1), (size, size))
    table, zeros = layout.table(("FHW", order)), torch.zeros_like(values)
    out = paroattn.attention(
        zeros, zeros, values, mask, table=table, order=torch.tensor([1, 0]), text_tokens=text.tokens, impl=impl
    )
    for head, row in ((0, table[1]), (1, table[0])):
        for block in row.long().split(size):
            mean = values[0, block, head].mean(0)
            close(out[0, block, head], mean.expand(len(block), -1), 1e-5)


@pytest.mark.parametrize("text", TEXTS, ids=str)
def test_kernel_order_and_back_changes_nothing(text):
    case = Case(text)
    there = reference.to_kernel_order(case.q, case.table, case.order)
    for head in range(HEADS):
        assert torch.equal(there[:, head], case.q[:, case.kernel_order(head), head])
    assert torch.equal(reference.to_model_order(there, case.table, case.order), case.q)


@both
def test_two_halves_of_the_keys_merge_by_lse(impl):
    case = Case(TEXTS[2], (16, 16), True, dtype=torch.float32)
    number = torch.arange(case.mask.key_blocks)
    kept = case.mask.dense() | (number == 0) | (number == 7)
    outs, logs = [], []
    for half in (kept & (number < 3), kept & (number >= 3)):
        case.mask = BlockMask.from_dense(half, (16, 16))
        out, lse = case.attention(impl=impl)
        outs.append(out.double())
        logs.append(lse.double().transpose(1, 2)[..., None])
    case.mask = BlockMask.from_dense(kept, (16, 16))
    whole, lse = case.attention(impl=impl)
    weights = torch.stack(logs).softmax(0)
    close((weights * torch.stack(outs)).sum(0), whole.double(), 5e-6)
    close(torch.stack(logs).logsumexp(0)[..., 0].transpose(1, 2), lse.double(), 5e-6)


@both
def test_the_softmax_scale_is_the_caller_s(impl):
    case = Case(dtype=torch.float32)
    out, lse = case.attention(impl=impl, softmax_scale=0.05)
    scaled = Case(dtype=torch.float32)
    scaled.q = case.q * (0.05 * math.sqrt(case.q.shape[-1]))
    expected, expected_lse = scaled.attention(impl=impl)
    close(out, expected, 1e-5)
    close(lse, expected_lse, 1e-5)
    close(case.attention(impl=impl, softmax_scale=0.05, return_lse=False), expected, 1e-5)


@both
def test_batch_elements_do_not_mix(impl):
    case = Case(TEXTS[1], padded=True, dtype=torch.float32)
    out, lse = case.attention(impl=impl)
    for element in (0, 1):
        alone = slice(element, element + 1)
        result, logs = paroattn.attention(
            *(x[alone] for x in case.qkv), case.mask, table=case.table, order=case.order, return_lse=True, impl=impl,
            text_tokens=case.text_tokens, valid_text=case.valid_text[alone],
        )  # fmt: skip
        close(out[alone], result, 1e-6)
        close(lse[alone], logs, 1e-6)


@both
def test_slices_of_a_fused_projection_do_as_well(impl):
    case = Case(dtype=torch.float32)
    expected, _ = case.attention(impl=impl)
    fused = torch.stack(case.qkv, 2)
    case.q, case.k, case.v = fused.unbind(2)
    assert not case.q.is_contiguous()
    assert torch.equal(case.attention(impl=impl)[0], expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8", "int4", "int8/fp8"])
def test_padding_is_never_read(precision):
    case = Case(TEXTS[1], (16, 32), True, dtype=torch.float32)
    before, lse = case.attention(precision=precision)
    real = torch.zeros(2, case.layout.tokens, dtype=torch.bool)
    for element, valid in enumerate(case.valid):
        real[element, case.kernel_order(0)[:valid]] = True
    assert 0 < (~real).sum() < case.text_tokens * 2
    for x in case.qkv:
        x[~real] = math.nan
    after, lse_after = case.attention(precision=precision)
    assert torch.equal(before[real], after[real])
    assert torch.equal(lse.transpose(1, 2)[real], lse_after.transpose(1, 2)[real])


def test_the_cpu_path_never_reads_dropped_blocks():
    case = Case(dtype=torch.float32, keep=0.3)
    kept = case.mask.dense()
    kept[0, :, 4] = kept[3, :, 6] = False
    kept[0, :, 2] = kept[3, :, 1] = True
    case.mask = BlockMask.from_dense(kept, (16, 16))
    before, _ = case.attention(impl="cpu")
    for head, block in ((0, 4), (3, 6)):
        tokens = case.kernel_order(head)[block * 16 : block * 16 + 16]
        case.k[:, tokens, head] = case.v[:, tokens, head] = math.nan
    assert torch.equal(case.attention(impl="cpu")[0], before)


@pytest.mark.parametrize(
    ("impl", "precision"), [("cpu", "fp32"), *(("reference", x) for x in ("fp32", "int8", "int4"))]
)
def test_a_row_without_real_keys_gives_zero_and_minus_infinity(impl, precision):
    tokens, generator = 48, torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, tokens, 2, 8, generator=generator) for _ in range(3))
    kept = torch.tensor([[[1, 0, 0], [0, 0, 1], [1, 1, 1]], [[0, 0, 1], [1, 0, 1], [1, 0, 0]]]).bool()
    mask = BlockMask.from_dense(kept, (16, 16))
    out, lse = paroattn.attention(
        q, k, v, mask, text_tokens=16, valid_text=torch.tensor([0, 16]), precision=precision, return_lse=True, impl=impl
    )
    empty = torch.zeros(2, 2, tokens, dtype=torch.bool)
    empty[0, 0, 16:32] = empty[0, 1, :16] = True
    assert torch.equal(lse == -math.inf, empty)
    assert torch.equal((out == 0).all(-1).transpose(1, 2), empty)
    assert out.isfinite().all()


QUANTISED = [("int8", "int8"), ("int4", "int4"), ("int8", "fp8"), ("fp8", "fp8"), ("int8", "fp64"), ("fp64", "int4")]


@pytest.mark.parametrize(("qk", "pv"), QUANTISED)
@pytest.mark.parametrize("block", [(16, 16), (32, 16), (16, 32)], ids=str)
def test_the_quantised_reference_equals_a_loop_over_blocks(qk, pv, block):
    case = Case(TEXTS[1], block, padded=True)
    out, lse = case.attention(precision=f"{qk}/{pv}")
    expected, expected_lse = quantised(case, qk, pv)
    close(out, expected, 1e-9)
    close(lse, expected_lse, 1e-9)
    assert error(out, exact(case)[0]) > 1e-3


@pytest.mark.parametrize(("side", "text_tokens"), [("prefix", 40), ("suffix", 64)])
def test_text_beside_a_video_in_int4_is_no_worse_than_in_int8(side, text_tokens):
    """Text looks at the video and is looked at; what its own four bits would cost is there where nobody says it is."""
    q, k, v = attention_like(1.0)
    video = q.shape[1] - text_tokens
    layout = Layout(Grid(video // 8, 2, 4), TextSpan(text_tokens, side))
    own = layout.text_positions
    k[:, own] += 2 * drawn(text_tokens, 2, 64)  # text has keys of its own, which the video looks at
    q[:, own] *= 1.5
    mask, order = BlockMask.full(2, 512, (64, 64)), torch.zeros(2, dtype=torch.int32)
    given = {"table": layout.table(("FHW",)), "order": order}
    expected = paroattn.attention(q, k, v, mask, **given)

    def noise(precision: str, text_tokens: int, rows: Tensor | slice) -> float:
        got = paroattn.attention(q, k, v, mask, **given, precision=precision, text_tokens=text_tokens)
        return sqnr(got[:, rows], expected[:, rows])

    known, unknown, eight = (noise(*each, own) for each in (("int4/fp64", text_tokens), ("int4/fp64", 0),
                                                            ("int8/fp64", text_tokens)))  # fmt: skip
    assert eight > known > unknown + 3
    everywhere = slice(None)
    assert noise("int4/fp64", text_tokens, everywhere) > noise("int4/fp64", 0, everywhere) + 1


FLOORS = {  # dB at flat, middling and peaked attention
    "bf16": (62, 55, 45), "fp16": (80, 73, 62), "fp8/fp8": (40, 34, 22), "int8/fp8": (41, 37, 29),
    "int8": (53, 44, 33), "int8-qk": (60, 48, 34), "int8-pv": (54, 45, 40),
    "int4": (35, 22, 10), "int4-qk": (38, 24, 10), "int4-pv": (38, 26, 20),
}  # fmt: skip
CONCENTRATIONS = (0.5, 1.0, 2.5)


def attention_like(concentration: float, tokens: int = 512, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Neighbouring tokens alike, keys with a common offset, values with a mean: (1, N, 2, 64) float64."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(1, tokens // 8, 2, 64, generator=generator).repeat_interleave(8, 1)
    q, k, v = (torch.randn(1, tokens, 2, 64, generator=generator) for _ in range(3))
    offset, mean = torch.randn(2, 1, 1, 2, 64, generator=generator)
    q, k = (concentration * 0.7 * (shared + x) for x in (q, k))
    return q.double(), (k + 2 * offset).double(), (v + shared + mean / 2).double()


@pytest.mark.parametrize("precision", FLOORS)
@pytest.mark.parametrize("level", range(3), ids=["flat", "middling", "peaked"])
def test_every_precision_keeps_its_floor_of_accuracy(precision, level):
    q, k, v = attention_like(CONCENTRATIONS[level])
    mask = BlockMask.from_dense(torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.4, (64, 64))
    expected = paroattn.attention(q, k, v, mask)
    got = paroattn.attention(q.float(), k.float(), v.float(), mask, precision=precision)
    assert sqnr(got, expected) >= FLOORS[precision][level]


@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("concentration", CONCENTRATIONS)
def test_a_denominator_of_quantised_weights_beats_one_of_exact_weights(form, concentration, monkeypatch):
    """Weights that add up to one reproduce what the values have in common; without any, neither choice always wins."""
    q, k, v = attention_like(concentration)
    v += 2 * v.mean(1, keepdim=True).sign()
    mask, shares, rounding = BlockMask.full(2, 512, (64, 64)), [], reference._round_p

    def recording(scores: Tensor, block: int, precision: Precision) -> tuple[Tensor, Tensor, Tensor]:
        exact_sum = (scores - scores.amax(-1, keepdim=True)).exp().sum(-1)
        p, total, largest = rounding(scores, block, precision)
        shares.append((total.squeeze(-1) / exact_sum).transpose(1, 2)[..., None])
        return p, total, largest

    expected = paroattn.attention(q, k, v, mask)
    monkeypatch.setattr(reference, "_round_p", recording)
    by_quantised = paroattn.attention(q, k, v, mask, precision=f"fp64/{form}")
    by_exact = by_quantised * torch.cat(shares, 1)
    assert sqnr(by_quantised, expected) > sqnr(by_exact, expected)
    constant = torch.ones_like(v) * v[:, :1]
    close(paroattn.attention(q, k, constant, mask, precision=f"fp64/{form}"), constant)


@pytest.mark.parametrize(("precision", "gain"), [("int8-qk", 5), ("int4-qk", 5)])
def test_the_rotation_gains_where_a_channel_sticks_out(precision, gain, monkeypatch):
    q, k, v = attention_like(0.5)
    q[..., 5] *= 8
    k[..., 11] *= 8
    mask = BlockMask.full(2, 512, (64, 64))
    expected = paroattn.attention(q, k, v, mask)
    rotated = sqnr(paroattn.attention(q.float(), k.float(), v.float(), mask, precision=precision), expected)
    monkeypatch.setattr(reference, "hadamard", lambda channels: torch.eye(channels))
    plain = sqnr(paroattn.attention(q.float(), k.float(), v.float(), mask, precision=precision), expected)
    assert rotated > plain + gain


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def rms(x: Tensor) -> float:
    return x.pow(2).mean().sqrt().item()


def test_errors_of_a_query_s_four_bits_hardly_matter_to_keys_of_few_directions():
    k = drawn(512, 8) @ drawn(8, 64) + drawn(512, 64) / 4
    q = drawn(96, 64)

    def error(feedback: Tensor | None) -> float:
        stored, scale = four_bits.round_queries(q, feedback)
        assert torch.equal(stored, stored.round()) and stored.min() >= -8 and stored.max() <= 7
        return rms((stored * scale - q) @ k.T)

    assert error(four_bits.feedback(k[::16])) < 0.6 * error(None)


def test_keys_that_have_a_middle_in_common_spend_their_bits_on_the_rest():
    k = drawn(256, 64) + 5 * drawn(8, 64).repeat_interleave(32, 0)
    stored, scale = four_bits.round_keys(k, None, 128)
    coarse, coarse_scale = four_bits.round_keys(k, None, 128, per_middle=128)
    assert rms(stored * scale - k) < 0.4 * rms(coarse * coarse_scale - k)
    assert scale.unique().numel() == 2 and stored.abs().max() <= 126
    far = torch.full((64, 64), 1e4, dtype=torch.float64) + drawn(64, 64)
    stored, scale = four_bits.round_keys(far, None, 64)
    assert stored.abs().max() <= 126 and rms(stored * scale - far) < 0.01 * 1e4


def test_errors_of_neighbouring_values_cancel():
    v = drawn(256, 64) / 4 + drawn(4, 64).repeat_interleave(64, 0)

    def error(weights: Tensor, **settings: Any) -> float:
        stored, scale = four_bits.round_values(v, **settings)
        return rms(weights @ (stored * scale - v).unflatten(0, (-1, 16)))

    alike, alone, nothing = torch.ones(16).double() / 16, torch.eye(16).double(), {"carry": 0.0, "from_fourth": 0.0}
    in_frames = (torch.arange(16)[:, None] - torch.arange(16)).remainder(4).eq(0).double() / 4
    assert error(alike) < 0.4 * error(alike, **nothing)
    assert error(alone) < 1.25 * error(alone, **nothing)
    assert error(in_frames) < 0.95 * error(in_frames, carry=0.25, from_fourth=0.0)
    stored, scale = four_bits.round_values(torch.full((64, 16), -0.3, dtype=torch.float64))
    close(stored * scale, torch.full_like(stored, -0.3))


def test_values_that_have_a_middle_in_common_spend_their_bits_on_the_rest():
    v = drawn(200, 64) + 5 * drawn(13, 64).repeat_interleave(16, 0)[:200]
    stored, scale = four_bits.round_values(v)
    coarse, coarse_scale = four_bits.round_values(v, per_middle=64)
    assert rms(stored * scale - v) < 0.4 * rms(coarse * coarse_scale - v)
    assert scale.shape == (1, 64) and 8 < stored.abs().max() <= 127
    far = torch.full((64, 64), 1e4, dtype=torch.float64) + drawn(64, 64)
    stored, scale = four_bits.round_values(far)
    assert stored.abs().max() <= 127 and rms(stored * scale - far) < 0.005 * 1e4


def test_weights_far_below_a_step_are_kept_on_average_over_rows_and_keys():
    for level in (0, 1 / 16, 0.3125, 6.5, 14.9375, 15):
        stored = four_bits.round_weights(torch.full((32, 2, 128), level, dtype=torch.float64), 16)
        assert set(stored.unique().tolist()) <= {math.floor(level), math.ceil(level)}
        spans = stored.unflatten(-1, (2, 64))
        close(spans.mean(-1), torch.full((32, 2, 2), level).double())
        close(spans.unflatten(0, (2, 16)).mean(1), torch.full((2, 2, 2, 64), level).double())


def test_what_a_weight_loses_the_16th_after_it_gets():
    p = 15 * torch.rand(5, 3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    stored = four_bits.round_weights(p, 4)
    assert stored.shape == p.shape and stored.min() >= 0 and stored.max() <= 15
    lost = (16 * p).round() / 16 - stored
    assert lost.abs().max() > 0.9 and (lost[..., :8] + lost[..., 16:24] + lost[..., 32:]).abs().max() < 1
    whole = four_bits.round_weights(torch.cat([p, p[..., :24], 15 - p], -1), 4)
    assert torch.equal(whole[..., :40], stored)
    assert torch.equal(whole[..., 64:], four_bits.round_weights(15 - p, 4))


def test_heads_of_different_precision_run_as_if_alone():
    case = Case(TEXTS[1], (32, 16), True, dtype=torch.float32)
    names = ["fp32", "int8", "int4/fp8", "fp32", Precision("int8", "int8")]
    out, lse = case.attention(precision=names)
    for head, name in enumerate(names):
        result, logs = case.attention(precision=name)
        close(out[:, :, head], result[:, :, head], 1e-5)
        close(lse[:, head], logs[:, head], 1e-5)
    close(case.attention(precision=names, return_lse=False), out, 1e-5)


@pytest.fixture
def calls(monkeypatch):
    """Which implementation ran for which precision and how many heads."""
    made = []
    for name, implementation in library.IMPLEMENTATIONS.items():

        def run(q, k, v, *, precision, _name=name, _run=implementation.run, **kwargs):
            made.append((_name, str(precision), q.shape[2]))
            return _run(q, k, v, precision=precision, **kwargs)

        changed = library.Implementation(run, implementation.needs, implementation.usable)
        monkeypatch.setitem(library.IMPLEMENTATIONS, name, changed)
    return made


@pytest.mark.parametrize(
    ("dtype", "precision", "expected"),
    [
        (torch.float32, None, [("cpu", "fp32", 5)]),
        (torch.float32, "fp32", [("cpu", "fp32", 5)]),
        (torch.float32, "int8", [("reference", "int8", 5)]),
        (torch.float32, "bf16", [("reference", "bf16", 5)]),
        (torch.bfloat16, None, [("reference", "bf16", 5)]),
        (torch.bfloat16, "fp32", [("reference", "fp32", 5)]),
        (torch.float16, None, [("reference", "fp16", 5)]),
        (torch.float64, None, [("reference", "fp64", 5)]),
        (torch.float32, ["int8", "fp32", "fp32", "int8", "int8"], [("reference", "int8", 3), ("cpu", "fp32", 2)]),
    ],
)
def test_the_implementation_follows_from_device_and_precision(dtype, precision, expected, calls):
    out, lse = Case(dtype=dtype).attention(precision=precision)
    assert calls == expected
    assert (out.dtype, lse.dtype) == (dtype, torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_threads_share_the_work_and_leave_pytorch_s_setting_alone(threads, mode):
    case = Case(TEXTS[1], (16, 32), True, dtype=torch.float32)
    alone = case.attention()
    if mode is torch.no_grad:
        case.q.requires_grad_()
    cpu._threads.cache_clear()
    torch.set_num_threads(threads)
    with mode():
        together = case.attention()
    close(together[0], alone[0], 1e-6)
    close(together[1], alone[1], 1e-6)
    assert not together[0].requires_grad
    elsewhere = []
    thread = Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *elsewhere] == [threads] * 2
    assert list(cpu._threads(threads).map(lambda _: torch.get_num_threads(), range(threads))) == [1] * threads


def test_the_schedule_of_a_mask_is_made_once_and_dies_with_it(monkeypatch):
    case, made, make = Case(TEXTS[1], padded=True, dtype=torch.float32), [], cpu._make_schedule
    monkeypatch.setattr(cpu, "_make_schedule", lambda *args: made.append(args[2]) or make(*args))
    for _ in range(3):
        case.attention()
    assert made == case.valid
    case.order = case.order.flip(0)
    case.attention()
    assert len(made) == 4
    for valid in range(10):
        cpu.schedule_of(case.mask, case.table[:5], 100 + valid)
    assert len(cpu._schedules[case.mask.bits]) == cpu.SCHEDULES_PER_MASK
    before = len(cpu._schedules)
    del case
    gc.collect()
    assert len(cpu._schedules) < before


def test_orders_changed_in_place_count():
    case = Case(dtype=torch.float32)
    case.attention(impl="cpu")
    case.order.copy_(case.order.flip(0))
    close(case.attention(impl="cpu")[0], case.attention(impl="reference")[0], 1e-5)


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_the_cpu_path_computes_hardly_more_than_the_kept_blocks(block, monkeypatch):
    tokens = 700
    monkeypatch.setattr(cpu, "SHORTEST_SHARE", 0.9)
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(HEADS, *(blocks_of(tokens, size) for size in block), generator=generator)
    kept = kept < torch.linspace(0.02, 0.9, HEADS)[:, None, None]
    kept[..., 0] = True
    mask = BlockMask.from_dense(kept, block)
    chunks = cpu.schedule_of(mask, torch.arange(tokens, dtype=torch.int32).expand(HEADS, -1), tokens).chunks
    last = tokens - (mask.key_blocks - 1) * block[1]
    wanted = int((kept * torch.tensor([block[1]] * (mask.key_blocks - 1) + [last])).sum())
    assert wanted <= sum((chunk.last - chunk.first) * chunk.tokens for chunk in chunks) <= wanted / cpu.SHORTEST_SHARE


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any call returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.paroattn.attention.default:  # look inside
            with self:
                return library._attention(*args)
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize(
    ("impl", "precision", "setting"),
    [
        ("cpu", "fp32", (cpu, "SCORES_AT_ONCE")),
        ("reference", "fp32", (reference, "ELEMENTS_AT_ONCE")),
        ("reference", "int8", (reference, "ELEMENTS_AT_ONCE")),
    ],
)
def test_memory_does_not_grow_with_the_square_of_the_tokens(impl, precision, setting, monkeypatch):
    tokens, heads, block, limit = 1500, 2, 16, 2 * 16 * 1520 * 2
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(heads, *[blocks_of(tokens, block)] * 2, generator=generator) < 0.5
    kept[..., 3] = kept[0, 5:20] = True
    q, k, v = (torch.randn(1, tokens, heads, 8, generator=generator) for _ in range(3))
    whole = paroattn.attention(q, k, v, BlockMask.from_dense(kept, (block, block)), precision=precision, impl=impl)
    monkeypatch.setattr(*setting, limit)
    with LargestTensor() as largest:
        mask = BlockMask.from_dense(kept, (block, block))
        out = paroattn.attention(q, k, v, mask, precision=precision, impl=impl)
    close(out, whole, 1e-5)
    assert largest.elements <= limit < heads * tokens**2 / 20


def refused(match: str, kind: type[Exception] = ValueError, **changes):
    """Call the operation on good arguments but for `changes`."""
    case = Case(TEXTS[1], dtype=torch.float32)
    arguments = {"q": case.q, "k": case.k, "v": case.v, "mask": case.mask, "table": case.table, "order": case.order}
    arguments |= {"text_tokens": case.text_tokens, "valid_text": torch.tensor([3, 23])}
    arguments |= {name: change(arguments.get(name)) for name, change in changes.items()}
    with pytest.raises(kind, match=match):
        paroattn.attention(**arguments)


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        (r"q must have shape \(B, N, H, D\), none of them 0; got \(128, 5, 24\)", {"q": lambda q: q[0]}),
        (r"q must have shape .* got \(0, 128, 5, 24\)", {"q": lambda q: q[:0]}),
        ("q must be float64, float32, float16 or bfloat16; got torch.int32", {"q": lambda q: q.int()}),
        (r"k must be like q, torch.float32 of shape .* got .* \(2, 127, 5, 24\)", {"k": lambda k: k[:, :-1]}),
        ("v must be like q, torch.float32 .*; got torch.float64", {"v": lambda v: v.double()}),
        ("v must be like q, .* on cpu; got .* on meta", {"v": lambda v: v.to("meta")}),
        ("no gradient; got tensors that require one. Call it under torch.no_grad", {"k": lambda k: k.requires_grad_()}),
        (r"must be one phase's, \(H, Nq, Nk\); got 4 dimensions. Use mask\[phase\]",
         {"mask": lambda mask: BlockMask(mask.bits[None], 8, (16, 16))}),
        ("cover 5 heads and 8×8 blocks of 16×16 for 128 tokens; got 4 heads",
         {"mask": lambda mask: BlockMask(mask.bits[:4], 8, (16, 16))}),
        ("5 heads and 7×7 blocks. BlockMask.with_text adds", {"mask": lambda mask: BlockMask.full(5, 105, (16, 16))}),
        ("cover 5 heads and 8×4 blocks of 16×32", {"mask": lambda mask: BlockMask(mask.bits, 8, (16, 32))}),
        ("the mask must be on cpu; got meta", {"mask": lambda mask: mask.to("meta")}),
        (r"table must be int32 of shape \(orders, 128\); got torch.int64", {"table": lambda table: table.long()}),
        (r"table must be .* got torch.int32 of shape \(7, 127\). Layout.table", {"table": lambda table: table[:, 1:]}),
        ("each position once; got row 6 that does not", {"table": lambda x: torch.cat([x[:6], x[6:].clamp(1)])}),
        ("table must be on cpu; got meta", {"table": lambda table: table.to("meta")}),
        (r"order must be integers of shape \(5,\); got .* of shape \(4,\)", {"order": lambda order: order[:4]}),
        (r"order must be integers .* got torch.float32", {"order": lambda order: order.float()}),
        (r"order must name rows 0…6 of table; got 1…7", {"order": lambda order: order + 1}),
        (r"order must name rows 0…6 of table; got -1…5", {"order": lambda order: order - 1}),
        (r"order must name rows 0…5 of table; got 0…6", {"table": lambda table: table[:6].clone()}),
        ("text_tokens must be 0…127 of 128 tokens; got 128", {"text_tokens": lambda n: 128}),
        ("text_tokens must be 0…127 of 128 tokens; got -1", {"text_tokens": lambda n: -1}),
        (r"valid_text must be integers of shape \(2,\); got torch.float32", {"valid_text": lambda n: n.float()}),
        (r"valid_text must be .* got torch.int64 of \(3,\)", {"valid_text": lambda n: torch.arange(3)}),
        (r"valid_text must be 0…23; got \[3, 24\]", {"valid_text": lambda n: torch.tensor([3, 24])}),
        (r"valid_text must be 0…23; got \[-1, 0\]", {"valid_text": lambda n: torch.tensor([-1, 0])}),
        ("valid_text must be on cpu; got meta", {"valid_text": lambda n: n.to("meta")}),
        ("precision must be one of fp64, fp32, .* got 'int3'", {"precision": lambda _: "int3"}),
        ("precision must be one name or one per head, 5 of them; got 4", {"precision": lambda _: ["fp32"] * 4}),
        ("softmax_scale must be finite; got nan", {"softmax_scale": lambda _: math.nan}),
        ("impl must be auto or one of cpu, reference.*; got 'cuda'", {"impl": lambda _: "cuda"}),
        ("cpu needs float32 tensors on a CPU and precision fp32; got int8 on torch.float32 .* on cpu. Choose another",
         {"impl": lambda _: "cpu", "precision": lambda _: "int8"}),
        ("cpu needs float32 .* got fp32 on torch.float64", {
            "impl": lambda _: "cpu", "precision": lambda _: "fp32",
            "q": lambda q: q.double(), "k": lambda k: k.double(), "v": lambda v: v.double()}),
        ("reference needs float64 tensors for precision fp64; got fp64 on", {"precision": lambda _: "fp64"}),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(match, changes):
    refused(match, **changes)


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        ("q must be a tensor; got list", {"q": lambda q: q.tolist()}),
        ("mask must be a BlockMask; got Tensor. BlockMask.from_dense", {"mask": lambda mask: mask.dense()}),
        ("table and order must both be tensors or both None; got Tensor and NoneType", {"order": lambda order: None}),
        ("both None; got NoneType and Tensor", {"table": lambda table: None}),
        ("text_tokens must be an integer; got float", {"text_tokens": lambda n: 23.0}),
        ("valid_text must be a tensor; got list", {"valid_text": lambda n: [3, 23]}),
        ("precision must be a name, a Precision or one of them per head; got int", {"precision": lambda _: 8}),
        ("precision must be a name, a Precision .*; got NoneType", {"precision": lambda _: [None] * 5}),
    ],
)  # fmt: skip
def test_arguments_of_another_type_are_refused(match, changes):
    refused(match, TypeError, **changes)


def test_an_order_is_checked_again_for_a_shorter_table():
    case = Case(dtype=torch.float32)
    case.attention()
    with pytest.raises(ValueError, match="order must name rows 0…5 of table; got 0…6"):
        case.attention(table=case.table[:6].clone())


def test_a_table_at_the_place_in_memory_of_one_that_was_checked_is_checked_too(monkeypatch):
    case = Case(dtype=torch.float32)
    table = torch.zeros_like(case.table)
    known = weakref.ref(case.table), weakref.ref(case.order)
    monkeypatch.setitem(public._checked_pairs, (id(table), id(case.order)), known)
    with pytest.raises(ValueError, match="must hold each position once"):
        case.attention(table=table)


def test_gradients_are_no_matter_where_none_are_recorded():
    case = Case(dtype=torch.float32)
    case.q.requires_grad_()
    with torch.no_grad():
        assert not case.attention()[0].requires_grad
