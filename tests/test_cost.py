"""The cost model: near everything that was measured, and honest about what was not."""

import json

import pytest

import rates as derivation
from forward_tables import dense_row
from paroattn.block_mask import parse_block
from paroattn.evaluation.forecast import predict
from paroattn.grid import Grid, Layout, TextSpan
from paroattn.plan.cost import Call, Kernel, TimeUnknown, gpus, kept_blocks, rates_of
from paroattn.plan.workloads import WORKLOADS, workload, workload_like
from predictions import predicted_ms
from result_tables import rows_of

H200 = rates_of("NVIDIA H200")
COG = Call(17776, 48, 64)
BLOCK = (64, 128)


def _call(row: dict) -> Call:
    return Call(row["tokens"], row["heads"], row["head_dim"], row["batch"])


def _worst(errors: list[float]) -> float:
    assert len(errors) > 3
    return max(map(abs, errors))


def test_the_packaged_rates_are_those_that_the_result_files_give():
    assert derivation.OUT.read_text() == json.dumps(
        {name: derivation.derived(gpu) for gpu, name in derivation.GPUS.items()}, indent=1
    ) + "\n", "run python benchmarks/rates.py"  # fmt: skip


@pytest.mark.parametrize("includes", ["kernel", "call"])
@pytest.mark.parametrize("mask", ["even", "uneven"])
def test_every_measured_attention_is_predicted_within_10_percent(includes, mask):
    errors = []
    for row in rows_of("attention_h200"):
        if (row["impl"], row["includes"], row["mask"]) != ("paroattn", includes, mask) or not row["ms"]:
            continue
        kept, block = derivation.kept(row), parse_block(row["block"])
        if includes == "kernel":
            ms = H200.kernel_ms(_call(row), kept, block, row["precision"])
        else:
            ms = H200.sparse_ms(_call(row), [kept / row["heads"]] * row["heads"], block, row["precision"])
        errors.append(ms / row["ms"] - 1)
    assert _worst(errors) <= 0.10


def test_preparing_and_dense_attention_are_predicted_within_3_and_9_percent():
    assert H200.preparing_ms(COG, "int4") > 1.5 * H200.preparing_ms(COG, "int8")
    preparing = [H200.preparing_ms(_call(row), row["precision"]) / row["ms"] - 1 for row in rows_of("prepare_h200")]
    assert _worst(preparing) <= 0.03
    dense = [row for row in rows_of("attention_h200") if row["impl"] == "cudnn" and row["ms"]]
    assert _worst([H200.dense_ms(_call(row)) / row["ms"] - 1 for row in dense]) <= 0.09


def test_every_measured_forward_and_speed_up_is_predicted_within_10_percent():
    rows = [row for row in rows_of("end_to_end_h200") if row["ms"] and predicted_ms(row)]
    assert _worst([predicted_ms(row) / row["ms"] - 1 for row in rows]) <= 0.10
    pairs = [(row, dense) for row in rows if row["impl"] == "paroattn" and (dense := dense_row(rows, row))]
    off = [predicted_ms(dense) / predicted_ms(row) / (dense["ms"] / row["ms"]) - 1 for row, dense in pairs]
    assert _worst(off) <= 0.10


def test_only_the_sum_of_kept_blocks_counts_and_each_one_costs_the_same():
    even = H200.sparse_ms(COG, [1000.0] * 48, BLOCK, "int8/fp8")
    assert H200.sparse_ms(COG, [0.0, 2000.0] * 24, BLOCK, "int8/fp8") == pytest.approx(even)
    one_more = H200.sparse_ms(COG, [1001.0] + [1000.0] * 47, BLOCK, "int8/fp8")
    assert one_more - even == pytest.approx(H200.kernel(64, BLOCK, "int8/fp8").block_ns * 1e-6)


def test_heads_of_two_precisions_are_two_launches_and_copies():
    mixed = H200.sparse_ms(COG, [1000.0] * 48, BLOCK, ["int8/fp8"] * 24 + ["bf16"] * 24)
    half = Call(17776, 24, 64)
    parts = [H200.sparse_ms(half, [1000.0] * 24, BLOCK, name) for name in ("int8/fp8", "bf16")]
    assert mixed == pytest.approx(sum(parts) + H200.copy_ms(16 * COG.elements))


def test_a_batch_takes_as_many_times_as_long_but_for_what_is_constant():
    twice = H200.sparse_ms(Call(17776, 48, 64, 2), [1000.0] * 48, BLOCK, "int8/fp8")
    constant = H200.kernel(64, BLOCK, "int8/fp8").launch_ms + H200.preparing[8, 64].constant_ms
    once = H200.sparse_ms(COG, [1000.0] * 48, BLOCK, "int8/fp8")
    assert twice - constant == pytest.approx(2 * (once - constant))
    assert H200.dense_ms(Call(17776, 48, 64, 2)) == pytest.approx(2 * H200.dense_ms(COG))


def test_kept_blocks_count_dense_text_and_the_block_where_it_begins():
    layout = Layout(Grid(2, 5, 10), TextSpan(30, "prefix"))  # 100 of video: 3 blocks of 32 and a mixed one; 130 in all
    assert kept_blocks(layout, (32, 64), [0.5, 1.0]) == [5 * 3 - 3 * 1 * 0.5, 15]
    assert kept_blocks(Layout(Grid(2, 5, 10)), (32, 64), [0.5]) == [4 * 2 * 0.5]


def test_what_was_not_measured_is_refused_with_what_was():
    with pytest.raises(TimeUnknown, match=r"int8/int8 in blocks of 64x128 with head dimension 64.*got fp32/fp32"):
        H200.sparse_ms(COG, [1.0] * 48, BLOCK, "fp32")
    with pytest.raises(TimeUnknown, match="blocks of 32x32"):
        H200.kernel(128, (32, 32), "int8/fp8")
    with pytest.raises(TimeUnknown, match=r"known for NVIDIA H200; got 'NVIDIA RTX 4090'.*paro doctor"):
        rates_of("NVIDIA RTX 4090")
    assert gpus() == ("NVIDIA H200",)


def test_scaled_rates_scale_every_part_by_its_own_factor():
    model, kernels = workload("wan-14b"), {(128, "int8/int8", (64, 64)): Kernel(0.1, 2.0, 3.0)}
    there = H200.scaled("another", dense=2.0, linear=3.0, memory=5.0, kernels=kernels)
    call = Call(32760, 40, 128)
    assert there.dense_ms(call) == pytest.approx(2 * H200.dense_ms(call))
    assert there.linear_ms(model, 100) == pytest.approx(3 * H200.linear_ms(model, 100))
    assert there.other_ms(model, 100) == pytest.approx(5 * H200.other_ms(model, 100))
    assert there.preparing_ms(call, "int8") == pytest.approx(5 * H200.preparing_ms(call, "int8"))
    assert there.kernel(128, (64, 64), "int8").block_ns == 3.0
    with pytest.raises(TimeUnknown, match="on another"):
        there.kernel(128, (64, 64), "int8/fp8")


def test_a_model_of_a_known_class_and_another_size_has_its_own_width():
    assert workload_like("WanTransformer3DModel", 40, 128, 40) is WORKLOADS["wan-14b"]
    small = workload_like("WanTransformer3DModel", 6, 64, 5, {"ffn_dim": 1024})
    assert small is not None
    assert small.linear_flops(10) == pytest.approx(2 * 10 * (6 * 384**2 + 2 * 1024 * 384))
    assert H200.other_ms(small, 10) > 0
    assert workload_like("UNet", 6, 64, 5) is None


def test_around_attention_there_are_linear_layers_cross_attention_and_all_else():
    wan, cog = workload("wan-14b"), workload("cogvideox-5b")
    parts = H200.linear_ms(wan, 1000) + H200.other_ms(wan, 1000) + H200.dense_ms(Call(1000, 40, 128), 512)
    assert H200.around_ms(wan, 1000) == pytest.approx(parts)
    assert H200.around_ms(cog, 1000) == pytest.approx(H200.linear_ms(cog, 1000) + H200.other_ms(cog, 1000))
    fp8 = H200.around_ms(cog, 1000, fp8_linears=True)
    assert H200.linear_ms(cog, 1000, fp8_linears=True) < H200.linear_ms(cog, 1000) and fp8 < H200.around_ms(cog, 1000)
    assert H200.around_ms(cog, 1000, mode="eager") > 1.5 * H200.around_ms(cog, 1000)


def test_a_layer_takes_no_less_than_its_launches_where_that_was_seen():
    flux = workload("flux")
    settings = {"block": (128, 128), "fp8_linears": True}
    small, large = (predict(H200, flux, size, 0.2, ("int8/fp8",), **settings) for size in ("1024", "2048"))
    assert small.forward_ms("int8/fp8", "compiled") == flux.layers * H200.launching_ms["compiled fp8"]
    for mode, found in (("eager", small), ("compiled", large)):
        inside = found.sparse_ms["int8/fp8"] + found.around_ms[mode]
        assert found.forward_ms("int8/fp8", mode) == pytest.approx(flux.layers * inside)
