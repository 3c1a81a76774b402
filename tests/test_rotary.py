"""Norm and rotary embedding of Wan's q and k in one pass: as diffusers computes them, and as the kernel does."""

import pytest
import torch
from tiny_models import random_plan, tiny_wan, wan_inputs

from paroattn import apply
from paroattn.integration import adapters
from paroattn.integration.adapters import WanProcessor, dispatching
from paroattn.integration.models import self_attentions
from paroattn.kernels.rotary import fusable, norm_rotate, reference_norm_rotate

SHAPES = [(2, 37, 3, 32), (1, 5, 4, 128), (3, 11, 12, 64)]
WHERE = [
    ("cpu", torch.float16),  # Triton's interpreter cuts bfloat16 off instead of rounding it
    *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.bfloat16, torch.float16)),
]


def operands(batch, tokens, heads, width, dtype=torch.float16, device="cpu"):
    """Q and k as parts of one projection, so that their rows do not lie side by side."""
    generator = torch.Generator().manual_seed(heads)
    channels = heads * width
    both = torch.randn(batch, tokens, 2 * channels, generator=generator) * torch.rand(2 * channels, generator=generator)
    both *= 1 + torch.arange(tokens)[:, None]
    weights = 0.5 + torch.rand(2, channels, generator=generator)
    angles = torch.randn(2, tokens, width, generator=generator)
    q, k = both.to(dtype).to(device).chunk(2, -1)
    rotations = [f(angle).to(device) for f, angle in zip((torch.cos, torch.sin), angles, strict=True)]
    return q, k, *weights.to(dtype).to(device), *rotations


def close(found, wanted):
    """Equal but where a value lies between two 16-bit numbers, which is rare, and then neighbours."""
    assert found.shape == wanted.shape and found.dtype == wanted.dtype
    assert (found != wanted).double().mean() < 2e-3
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("device", "dtype"), WHERE)
def test_the_kernel_computes_what_separate_operations_do(device, dtype, shape):
    heads = shape[2]
    q, k, q_weight, k_weight, cosines, sines = operands(*shape, dtype, device)
    found = norm_rotate(q, k, q_weight, k_weight, cosines, sines, heads=heads, eps=1e-6)
    for x, weight, each in zip((q, k), (q_weight, k_weight), found, strict=True):
        close(each, reference_norm_rotate(x, weight, cosines, sines, heads, 1e-6))


def test_the_first_term_keeps_rows_of_zeros_finite():
    q, k, *rest = operands(*SHAPES[0])
    found = norm_rotate(torch.zeros_like(q), k, *rest, heads=3, eps=1e-6)[0]
    assert torch.equal(found, torch.zeros_like(found))


def test_compilers_are_told_the_shapes():
    q, k, *rest = operands(*SHAPES[0])
    torch.library.opcheck(
        torch.ops.paroattn.norm_rotate, (q, k, *rest, 3, 1e-6), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("name", ["k", "q_weight", "k_weight", "cosines", "sines"])
def test_shapes_that_do_not_fit_are_named(name):
    given = dict(zip(("q", "k", "q_weight", "k_weight", "cosines", "sines"), operands(*SHAPES[0]), strict=True))
    given[name] = given[name][:, :-1] if given[name].ndim > 1 else given[name][:-1]
    with pytest.raises(ValueError, match=rf"{name} must be \(.*\) for q \(2, 37, 96\) and 3 heads; got"):
        norm_rotate(**given, heads=3, eps=1e-6)


class OnGpu:
    """What `fusable` looks at of a tensor on a GPU."""

    is_cuda, device = True, torch.device("cuda")

    def __init__(self, dtype=torch.bfloat16, device=device):
        self.dtype, self.device = dtype, device


def test_only_what_the_kernel_can_do_is_fused(monkeypatch):
    x, single = OnGpu(), OnGpu(torch.float32)
    with torch.no_grad():
        assert fusable(x, (x, x), (single, single))
        assert not fusable(single, (single, single), (single, single))
        assert not fusable(x, (x, single), (single, single))
        assert not fusable(x, (x, OnGpu(device=torch.device("meta"))), (single, single))
        assert not fusable(x, (x, x), (single, OnGpu(torch.float64)))
        assert not fusable(torch.zeros(1, dtype=torch.bfloat16), (x, x), (single, single))
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        assert not fusable(x, (x, x), (single, single))
        monkeypatch.undo()
    assert not fusable(x, (x, x), (single, single))  # a gradient may be wanted


@pytest.fixture
def fused(monkeypatch):
    """Every self-attention of Wan takes the one pass, in plain PyTorch; returns how often."""
    calls = []

    def norm_rotate(q, k, q_weight, k_weight, *rotations, heads, eps):
        calls.append(q.shape)
        return tuple(
            reference_norm_rotate(x, weight, *rotations, heads, eps) for x, weight in ((q, q_weight), (k, k_weight))
        )

    monkeypatch.setattr(adapters, "fusable", lambda *_: True)
    monkeypatch.setattr(adapters, "norm_rotate", norm_rotate)
    return calls


@pytest.mark.parametrize("projections", ["apart", "together"])
def test_wan_computes_bit_for_bit_what_diffusers_does(projections, fused):
    model = tiny_wan().bfloat16()
    if projections == "together":
        model.fuse_qkv_projections()
    inputs = {name: x.bfloat16() if x.is_floating_point() else x for name, x in wan_inputs().items()}
    stock = model(**inputs, return_dict=False)[0]
    assert not fused
    layers = self_attentions(model)
    for attn in layers.values():
        attn.processor = dispatching(attn.processor)
        assert isinstance(attn.processor, WanProcessor)
    assert torch.equal(model(**inputs, return_dict=False)[0], stock)
    assert len(fused) == len(layers)


def test_a_plan_brings_the_one_pass_and_cross_attention_keeps_its_own(fused):
    model = tiny_wan()
    apply(model, random_plan())
    assert all(isinstance(attn.processor, WanProcessor) for attn in self_attentions(model).values())
    model(**wan_inputs())
    assert len(fused) == len(self_attentions(model))
