"""Number formats and scales, checked against known values and explicit loops."""

import itertools

import pytest
import torch

from paroattn.precision import FORMATS, GRANULARITIES, PRECISIONS, Precision, dequantize, hadamard, quantize, round_to

SCALED = [name for name, form in FORMATS.items() if form.scaled]
SIGNED = [name for name in SCALED if not name.startswith("uint")]


def tokens_and_channels() -> torch.Tensor:
    """(2, 3, 10, 4) float64 whose magnitude differs in every batch element, head, token and channel."""
    x = torch.randn(2, 3, 10, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x * torch.rand(2, 3, 10, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).exp()


@pytest.mark.parametrize(
    ("name", "values", "stored"),
    [
        ("int8", [0.4, 0.5, 1.5, -2.5, 126.6, 300.0, -300.0], [0, 0, 2, -2, 127, 127, -127]),
        ("int4", [0.4, 0.5, 1.5, -2.5, 6.6, 300.0, -300.0], [0, 0, 2, -2, 7, 7, -7]),
        ("uint8", [0.4, 254.6, 300.0, -1.0], [0, 255, 255, 0]),
        ("uint4", [0.4, 0.5, 1.5, -2.5, 14.6, 300.0, -300.0], [0, 0, 2, 0, 15, 15, 0]),
        ("fp8", [0.4, 17.0, 19.0, -2.3, 440.0, 1e6, -1e6], [0.40625, 16, 20, -2.25, 448, 448, -448]),
        ("bf16", [1 + 2**-8, 1 + 2**-7, 3.0], [1, 1 + 2**-7, 3]),
        ("fp16", [1 + 2**-11, 1 + 2**-10, 3.0], [1, 1 + 2**-10, 3]),
        ("fp32", [1 + 2**-24, 0.1], [1, torch.tensor(0.1).item()]),
        ("fp64", [1 + 2**-24, 0.1], [1 + 2**-24, 0.1]),
    ],
)
def test_formats_round_to_nearest_even_and_saturate(name, values, stored):
    rounded = round_to(torch.tensor(values, dtype=torch.float64), FORMATS[name])
    assert rounded.tolist() == stored


@pytest.mark.parametrize("name", SIGNED)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_scale_is_the_largest_magnitude_of_what_shares_it(name, granularity):
    x, form, block = tokens_and_channels(), FORMATS[name], 4
    values, scale = quantize(x, form, granularity, block if granularity == "block" else None)
    scale = scale.expand_as(x)
    for b, h, n, d in itertools.product(*map(range, x.shape)):
        sharing = {
            "tensor": x,
            "head": x[b, h],
            "block": x[b, h, n // block * block : (n // block + 1) * block],
            "token": x[b, h, n],
            "channel": x[b, h, :, d],
        }[granularity]
        expected = sharing.abs().max() / form.highest
        assert scale[b, h, n, d].item() == pytest.approx(expected.item(), rel=1e-12)
        assert values[b, h, n, d] == round_to(x[b, h, n, d] / expected, form)


@pytest.mark.parametrize("name", SIGNED)
def test_the_error_of_a_stored_value_is_at_most_half_a_step(name):
    x, form = tokens_and_channels(), FORMATS[name]
    values, scale = quantize(x, form, "token")
    step = scale if form.dtype == torch.int8 else (x.abs() / 8).clamp_min(scale * 2**-9)
    assert ((dequantize(values, scale) - x).abs() <= step / 2 * 1.0001).all()
    assert values.abs().max() == form.highest


@pytest.mark.parametrize("name", SIGNED)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_zeros_stay_zeros(name, granularity):
    values, scale = quantize(torch.zeros(2, 6, 4), FORMATS[name], granularity, 4 if granularity == "block" else None)
    assert torch.equal(dequantize(values, scale), torch.zeros(2, 6, 4))


def test_values_keep_their_dtype_and_a_floating_format_has_scale_one():
    x = torch.randn(6, 4)
    values, scale = quantize(x, FORMATS["bf16"], "token")
    assert values.dtype == torch.float32
    assert scale.tolist() == 1.0
    assert torch.equal(values, x.bfloat16().float())
    assert quantize(x, FORMATS["int8"], "token")[0].dtype == torch.float32


def test_precisions_read_what_they_write():
    for name, precision in PRECISIONS.items():
        assert Precision.parse(name) == precision
        assert str(precision) == name
    assert Precision.parse("int8/fp8") == Precision("int8", "fp8")
    assert str(Precision("int8", "fp8")) == "int8/fp8"
    assert str(Precision("int8", "int8")) == "int8"
    assert Precision.parse(Precision("int8", "fp8")) == Precision("int8", "fp8")


def test_names_of_whole_model_precisions_mean_what_the_results_say():
    assert Precision.parse("int8-qk") == Precision("int8", "bf16")
    assert Precision.parse("int4-pv") == Precision("bf16", "int4")
    assert Precision.parse("int4") == Precision("int4", "int4")
    assert [name for name, precision in PRECISIONS.items() if precision.quantised] == [
        "int8", "int8-qk", "int8-pv", "int4", "int4-qk", "int4-pv",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "shown"),
    [("", ""), ("int3", "int3"), ("INT8", "INT8"), ("int8/", ""), ("int8/int3", "int3"), ("int8/int8/int8",) * 2],
)
def test_unknown_precisions_are_refused(text, shown):
    with pytest.raises(ValueError, match=rf"must be one of fp64, fp32, fp16, bf16.*; got '{shown}'"):
        Precision.parse(text)


def test_unsigned_four_bits_are_for_weights_only():
    with pytest.raises(ValueError, match="pv must be one of fp64, fp32, fp16, bf16, fp8, int8, int4; got 'uint4'"):
        Precision("int8", "uint4")


@pytest.mark.parametrize(("granularity", "block"), [("row", None), ("block", None), ("token", 64)])
def test_a_granularity_and_a_block_size_must_fit(granularity, block):
    with pytest.raises(ValueError, match="with a block size for block only; got"):
        quantize(torch.randn(6, 4), FORMATS["int8"], granularity, block)


@pytest.mark.parametrize("channels", [1, 24, 64])
def test_the_rotation_keeps_dot_products_and_spreads_one_channel_over_all(channels):
    rotation = hadamard(channels)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(channels, dtype=torch.float64))
    assert rotation.abs().unique().numel() == 1
