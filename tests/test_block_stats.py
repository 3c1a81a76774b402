"""Statistics against their definitions, written out with explicit maps in float64."""

import pytest
import torch

from paroattn.grid import Grid, Layout, TextSpan
from paroattn.kernels import block_stats as module
from paroattn.kernels.block_stats import block_stats

ORDERS = ("FHW", "WHF", "2x2x3")
BLOCK = (16, 32)
HEADS, DIM, CHANNELS = 3, 8, 20


def _inputs(layout: Layout, batch: int = 2, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, layout.tokens, HEADS, DIM, generator=generator).double() * 1.5 for _ in range(3))
    return q, k, v, torch.randn(HEADS, DIM, CHANNELS, generator=generator).double()


def _map(q, k, batch, head):
    return torch.softmax(q[batch, :, head] @ k[batch, :, head].T * DIM**-0.5, -1)


@pytest.mark.parametrize("text", [TextSpan(), TextSpan(9, "prefix"), TextSpan(9, "suffix")], ids=str)
def test_every_block_of_every_order_and_head_follows_the_definitions(text, monkeypatch):
    monkeypatch.setitem(module.ELEMENTS_AT_ONCE, "cpu", HEADS * 20 * 114)
    layout = Layout(Grid(3, 5, 7), text)
    q, k, v, w_o = _inputs(layout)
    found = block_stats(q, k, v, w_o, layout=layout, orders=ORDERS, block=BLOCK)
    assert found.calls == 2
    video = layout.table(ORDERS).long()[:, : layout.grid.tokens]
    for index in range(len(ORDERS)):
        for head in range(HEADS):
            incoherence, sparse = [], []
            for i, rows in enumerate(video[index].split(BLOCK[0])):
                for j, columns in enumerate(video[index].split(BLOCK[1])):
                    mass = error = 0.0
                    for batch in range(2):
                        p = _map(q, k, batch, head)[rows]
                        part, values = p[:, columns], v[batch, :, head]
                        output = p @ values
                        dropped = part @ values[columns] - part.sum(1, keepdim=True) * output
                        mass += part.sum() / len(rows)
                        error += (dropped @ w_o[head]).square().sum()
                        incoherence.append(part.max() / part.mean())
                        sparse.append((part < module.SMALL).double().mean() >= module.SMALL_SHARE)
                    torch.testing.assert_close(found.mass[index, head, i, j], mass)
                    torch.testing.assert_close(found.error[index, head, i, j], error)
            torch.testing.assert_close(found.incoherence[index, head], 2 * torch.stack(incoherence).mean())
            torch.testing.assert_close(found.sparse_share[index, head], 2 * torch.stack(sparse).double().mean())


def test_output_power_is_the_sum_over_heads_and_video_rows():
    layout = Layout(Grid(2, 3, 5), TextSpan(4, "prefix"))
    q, k, v, w_o = _inputs(layout)
    found = block_stats(q, k, v, w_o, layout=layout, orders=("FHW",), block=(8, 8))
    outputs = [_map(q, k, b, h)[4:] @ v[b, :, h] @ w_o[h] for b in range(2) for h in range(HEADS)]
    torch.testing.assert_close(found.output_power, sum(each.square().sum() for each in outputs))


def test_error_is_the_squared_change_of_the_projected_output_when_one_block_goes():
    """To first order: dropping block j gives E with every row divided by (1 − m)²."""
    layout = Layout(Grid(2, 3, 4))
    q, k, v, w_o = _inputs(layout, batch=1)
    found = block_stats(q, k, v, w_o, layout=layout, orders=("FHW",), block=(1, 4))
    p = _map(q, k, 0, 1)
    kept = p.clone()
    kept[:, 4:8] = 0
    change = (kept / kept.sum(1, keepdim=True) - p) @ v[0, :, 1] @ w_o[1]
    expected = change.square().sum(1) * (1 - found.mass[0, 1, :, 1]) ** 2
    torch.testing.assert_close(found.error[0, 1, :, 1], expected)


def test_sampled_rows_estimate_the_sums_of_all_rows():
    layout = Layout(Grid(4, 8, 12))
    q, k, v, w_o = _inputs(layout, batch=1)
    whole = block_stats(q, k, v, w_o, layout=layout, orders=ORDERS, block=(32, 32))
    samples = [
        block_stats(q, k, v, w_o, layout=layout, orders=ORDERS, block=(32, 32), row_stride=4, row_offset=offset)
        for offset in range(4)
    ]
    for name in ("mass", "error", "output_power"):
        mean = torch.stack([getattr(sample, name) for sample in samples]).mean(0)
        torch.testing.assert_close(mean, getattr(whole, name), rtol=1e-6, atol=1e-9, msg=name)


def test_leaving_out_the_papers_statistics_changes_nothing_else():
    layout = Layout(Grid(3, 4, 5))
    q, k, v, w_o = _inputs(layout)
    whole, short = (
        block_stats(q, k, v, w_o, layout=layout, orders=ORDERS, block=BLOCK, paper=paper) for paper in (True, False)
    )
    assert torch.equal(whole.mass, short.mass) and torch.equal(whole.error, short.error)
    assert short.incoherence.abs().sum() == 0 == short.sparse_share.sum()


def test_a_stride_that_leaves_a_block_without_rows_is_refused():
    layout = Layout(Grid(3, 4, 5))
    q, k, v, w_o = _inputs(layout)
    with pytest.raises(ValueError, match="row_stride must leave every query block of 8 tokens a row; got 40"):
        block_stats(q, k, v, w_o, layout=layout, orders=ORDERS, block=(8, 8), row_stride=40)
