"""Statistics against their definitions, written out with explicit maps in float64."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from paroattn.block_mask import BlockMask
from paroattn.capture import CaptureSettings, Statistics
from paroattn.grid import Grid, Layout, TextSpan
from paroattn.integration.calibrate import calibrate
from paroattn.kernels import block_stats as module
from paroattn.kernels import rounding
from paroattn.kernels.attention import attention
from paroattn.kernels.block_stats import block_stats
from paroattn.plan.search import PlanSettings, choose_orders, make_plan

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
    with pytest.raises(ValueError, match=r"a row in every query block of 8 tokens, .* got 40\. Take .* such as 10"):
        block_stats(q, k, v, w_o, layout=layout, orders=ORDERS, block=(8, 8), row_stride=40)


@pytest.mark.parametrize("stride", [1, 2, 3, 5, 16])
def test_the_samples_of_a_stride_hold_every_query_block_once(stride):
    samples = [module._sample(37, stride, offset) for offset in range(stride)]
    assert sorted(torch.cat(samples).tolist()) == list(range(37))
    for sample in samples:
        assert sample.tolist() == sorted(sample.tolist())
        assert sample.diff().max() < 2 * stride  # no gap longer than two strides


def test_a_sample_is_not_in_step_with_a_grid_s_period():
    assert len({block % 32 for block in module._sample(512, 16, 3).tolist()}) > 8


@pytest.mark.parametrize("text", [TextSpan(), TextSpan(9, "prefix")], ids=str)
def test_a_sample_holds_the_rows_of_the_whole_map_and_nothing_else(text):
    layout = Layout(Grid(3, 5, 7), text)
    q, k, v, w_o = _inputs(layout)
    whole = block_stats(q, k, v, w_o, layout=layout, orders=ORDERS, block=BLOCK)
    assert whole.rows is None
    for offset in range(3):
        sample = block_stats(
            q, k, v, w_o, layout=layout, orders=ORDERS, block=BLOCK, block_stride=3, block_offset=offset
        )
        assert sample.mass.shape[2] == len(sample.rows) < whole.mass.shape[2]
        for name in ("mass", "error"):
            torch.testing.assert_close(getattr(sample, name), getattr(whole, name)[:, :, sample.rows], msg=name)


def test_samples_estimate_the_sums_of_the_whole_map_without_bias():
    layout = Layout(Grid(3, 5, 7))
    q, k, v, w_o = _inputs(layout)
    settings = {"layout": layout, "orders": ORDERS, "block": (8, 32)}
    whole = block_stats(q, k, v, w_o, **settings)
    samples = [block_stats(q, k, v, w_o, **settings, block_stride=5, block_offset=offset) for offset in range(5)]
    for name in ("mass", "error"):
        total = torch.stack([getattr(sample, name).sum((2, 3)) * 5 for sample in samples]).mean(0)
        torch.testing.assert_close(total, getattr(whole, name).sum((2, 3)), msg=name)
    power = torch.stack([sample.output_power for sample in samples]).mean()
    torch.testing.assert_close(power, whole.output_power)


def test_each_head_can_be_measured_in_an_order_of_its_own():
    layout = Layout(Grid(3, 5, 7), TextSpan(9, "prefix"))
    q, k, v, w_o = _inputs(layout)
    order = torch.tensor([2, 0, 1])
    settings = {"layout": layout, "orders": ORDERS, "block": BLOCK}
    for stride in ({}, {"block_stride": 2, "block_offset": 1}, {"row_stride": 3}):
        every = block_stats(q, k, v, w_o, **settings, **stride)
        own = block_stats(q, k, v, w_o, **settings, **stride, order=order)
        assert own.mass.shape == (1, *every.mass.shape[1:])
        for name in ("mass", "error", "sparse_share", "incoherence"):
            picked = getattr(every, name)[order, torch.arange(HEADS)]
            torch.testing.assert_close(getattr(own, name)[0], picked, msg=name)
        if "block_stride" not in stride:
            torch.testing.assert_close(own.output_power, every.output_power)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_stride": 8}, "block_stride must be 1…7 for 7 query blocks; got 8"),
        ({"block_stride": 0}, "block_stride must be 1…7 for 7 query blocks; got 0"),
        ({"order": torch.tensor([0, 1])}, r"one of 3 orders for each of 3 heads; got \[0, 1\]"),
        ({"order": torch.tensor([0, 1, 3])}, r"one of 3 orders for each of 3 heads; got \[0, 1, 3\]"),
        ({"impl": "cuda"}, "impl must be auto or one of torch, triton; got 'cuda'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    layout = Layout(Grid(3, 5, 7))
    with pytest.raises(ValueError, match=message):
        block_stats(*_inputs(layout), layout=layout, orders=ORDERS, block=BLOCK, **settings)


def test_a_projection_that_loses_channels_does_as_well():
    layout = Layout(Grid(2, 3, 5))
    q, k, v, w_o = _inputs(layout)
    w_o[1] = w_o[1, :1] * torch.arange(DIM)[:, None]
    w_o[2] = 0
    found = block_stats(q, k, v, w_o, layout=layout, orders=("FHW",), block=(8, 8))
    outputs = [_map(q, k, b, h) @ v[b, :, h] @ w_o[h] for b in range(2) for h in range(HEADS)]
    torch.testing.assert_close(found.output_power, sum(each.square().sum() for each in outputs))
    assert found.error[0, 2].max() < 1e-12


def _statistics(stride: int) -> Statistics:
    layout = Layout(Grid(3, 5, 7), TextSpan(4, "prefix"))
    settings = CaptureSettings(orders=ORDERS, block=BLOCK, block_stride=stride)
    statistics = Statistics("Model", HEADS, DIM, layout, settings)
    for step, level in enumerate((0.9, 0.9, 0.5, 0.2)):
        statistics.add("layer", *_inputs(layout, 1, seed=step), level, block_stats)
    return statistics


def test_every_noise_level_has_a_sample_of_its_own_and_its_maps_share_it():
    statistics, whole = _statistics(3), _statistics(1)
    levels = statistics.layers["layer"]
    for offset, level in enumerate((0.9, 0.5, 0.2)):
        assert torch.equal(levels[level].rows, module._sample(7, 3, offset))
    assert levels[0.9].calls == 2
    for level, sums in levels.items():
        expected = whole.layers["layer"][level].error[:, :, sums.rows]
        torch.testing.assert_close(sums.error, expected)


def test_orders_can_be_chosen_from_samples_and_masks_cannot_be_made(tmp_path):
    statistics, whole = _statistics(3), _statistics(1)
    assert statistics.mean("layer", "error").shape == (3, HEADS, 7, 4)  # three levels, every query block once
    assert statistics.mean("layer", "output_power").ndim == 0
    orders = choose_orders(statistics, "layer", PlanSettings(0.5, orders=ORDERS))
    assert orders.shape == (HEADS,)
    with pytest.raises(ValueError, match="a mask needs statistics of all query blocks; got one in 3"):
        make_plan(statistics, PlanSettings(0.5, orders=ORDERS))
    make_plan(whole, PlanSettings(0.5, orders=ORDERS))
    again = Statistics.load(statistics.save(tmp_path / "statistics"))
    assert again.settings == statistics.settings
    assert torch.equal(again.mean("layer", "error"), statistics.mean("layer", "error"))
    for level, sums in statistics.layers["layer"].items():
        assert torch.equal(again.layers["layer"][level].rows, sums.rows)


def test_a_sample_takes_less_memory():
    layout = Layout(Grid(21, 45, 80))
    with pytest.raises(ValueError, match="must stay below 16 GiB"):
        Statistics("Model", 40, 128, layout, CaptureSettings(block=(128, 128))).check_size(40, 10)
    Statistics("Model", 40, 128, layout, CaptureSettings(block=(128, 128), block_stride=32)).check_size(40, 10)
    with pytest.raises(ValueError, match=r"must be positive; got \(64, 64\), 1 and 0"):
        CaptureSettings(block_stride=0)


def test_calibration_refuses_to_make_masks_from_a_sample_before_anything_runs():
    with pytest.raises(ValueError, match=r"block_stride must be 1 to make a plan, .* got 16"):
        calibrate(None, "a prompt", precision="fp32", capture=CaptureSettings(block_stride=16))


def test_rounding_costs_what_the_whole_attention_in_that_precision_errs():
    """Every row of the video is measured where they are few; the text's rows are not, but its keys are read."""
    text = 5
    layout = Layout(Grid(2, 4, 7), TextSpan(text, "prefix"))
    q, k, v, w_o = _inputs(layout)
    found = block_stats(q, k, v, w_o, layout=layout, orders=("FHW",), block=(16, 8), rounding=True)
    without = block_stats(q, k, v, w_o, layout=layout, orders=("FHW",), block=(16, 8))
    assert found.rounding is not None and without.rounding is None
    assert torch.equal(found.error, without.error)
    heads, tokens = q.shape[2], layout.tokens
    given = {"table": layout.table(("FHW",)), "order": torch.zeros(heads, dtype=torch.int32), "text_tokens": text}
    mask, first = BlockMask.full(heads, tokens, (16, 8)), [x[:1] for x in (q, k, v)]
    exact: Any = attention(*first, mask, **given)
    for row, precision in enumerate(("int8", "int4")):
        got: Any = attention(*first, mask, **given, precision=precision)
        expected = torch.einsum("nhd,hdc->nhc", (got - exact)[0, text:], w_o).square().sum((0, 2))
        torch.testing.assert_close(found.rounding[row], expected.to(found.rounding.dtype), rtol=1e-6, atol=1e-12)
    assert (found.rounding[1] > 20 * found.rounding[0]).all()


def test_rounding_is_estimated_from_rows_all_over_a_long_video(monkeypatch):
    layout = Layout(Grid(4, 8, 16))
    q, k, v, w_o = _inputs(layout)
    settings = {"layout": layout, "orders": ("FHW",), "block": (64, 64), "rounding": True}
    sample: Any = block_stats(q, k, v, w_o, **settings).rounding
    monkeypatch.setattr(rounding, "ELEMENTS_AT_ONCE", 1)  # head by head
    assert torch.equal(block_stats(q, k, v, w_o, **settings).rounding, sample)
    monkeypatch.setattr(rounding, "ROWS", 512)
    whole = block_stats(q, k, v, w_o, **settings).rounding
    assert sample.shape == (2, q.shape[2]) and (sample / whole - 1).abs().max() < 0.5
    assert ((sample / whole).mean(1) - 1).abs().max() < 0.2
    rows = rounding._rows(75600)
    assert len(rows) == 512 and (rows.diff() > 0).all() and len((rows % 80).unique()) == 80


def test_rounding_is_measured_once_for_each_layer_and_noise_level_and_kept(tmp_path):
    layout = Layout(Grid(2, 4, 7))
    q, k, v, w_o = _inputs(layout)
    for codes in (False, True):
        settings = CaptureSettings(orders=("FHW",), block=(16, 8), paper=False, codes=codes)
        statistics, asked = Statistics("M", q.shape[2], q.shape[3], layout, settings), []

        def measure(*args, asked=asked, **kwargs):
            asked.append(kwargs["rounding"])
            return block_stats(*args, **kwargs)

        for level, factor in ((0.9, 1), (0.9, 3), (0.4, 2)):
            statistics.add("a", q * factor, k, v, w_o, level, measure)
        assert asked == [True, False, True]
        given = {"layout": layout, "orders": ("FHW",), "block": (16, 8), "rounding": True}
        each: Any = [block_stats(q * n, k, v, w_o, **given).rounding for n in (1, 2)]
        loaded = Statistics.load(statistics.save(tmp_path / str(codes)))
        for one in (statistics, loaded):
            for levels, expected in ((None, torch.stack(each).mean(0)), ([0.4], each[1])):
                torch.testing.assert_close(one.rounding("a", levels), expected, check_dtype=False)
        old = Statistics("M", q.shape[2], q.shape[3], layout, replace(settings, rounding=False))
        old.add("a", q, k, v, w_o, 0.9, block_stats)
        there = old.save(tmp_path / f"old {codes}") / "statistics.json"
        described = json.loads(there.read_text())
        del described["settings"]["rounding"]  # as an earlier version wrote it
        there.write_text(json.dumps(described))
        loaded = Statistics.load(there.parent)
        assert loaded.rounding("a") is None and loaded.settings.rounding is False
