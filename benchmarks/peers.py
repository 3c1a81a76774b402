"""Other attention kernels, each behind one function: q, k, v (B, N, H, D) and a mask in, a call to time out.

A function takes a `Case` and returns a call without arguments, whose result is (B, H, N, D); it raises `Missing`, with
the reason, where the peer cannot run. Peers get contiguous (B, H, N, D) tensors and a mask in their own form, both made
before the clock starts, and read the tokens in the model's order: reordering is not among what is timed. All else that
they need per call is: smoothing, quantising, transposing, index lists. Those that take FP8 and leave quantising to
their callers get e4m3 from a compiled function, with one scale for each tensor and no smoothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from shapes import DRAWN, block_mask, divided

FP8 = torch.float8_e4m3fn
NUMERATORS = 256.0
"""By what cuDNN multiplies the softmax's numerators, which are at most 1, before it rounds them to FP8."""
NO_WHEEL = "; no wheel of it is published"


class Missing(Exception):
    """Why a peer cannot run here."""


@dataclass(frozen=True)
class Case:
    """What is attended to: q, k and v as (B, N, H, D) and as (B, H, N, D), and kept blocks from `shapes.draw`."""

    model: tuple[Tensor, Tensor, Tensor]
    heads_first: tuple[Tensor, Tensor, Tensor]
    kept: Tensor

    def mask(self, *block: int) -> Tensor:
        """Kept blocks of another size, (B, H, Nq, Nk)."""
        batch, tokens = self.model[0].shape[:2]
        return divided(self.kept, tokens, (block[0], block[1])).expand(batch, -1, -1, -1).contiguous()


@dataclass(frozen=True)
class Peer:
    """One row of `PEERS`.

    Attributes:
        call: Function from a case to the call that is timed.
        precision: Formats of the two products, QK/PV.
        block: Blocks in which it takes a mask, "QUERYxKEY"; None if it is dense.
    """

    call: Callable[[Case], Callable[[], Tensor]]
    precision: str
    block: str | None = None


def sdpa(backend: SDPBackend, case: Case) -> Callable[[], Tensor]:
    q, k, v = case.heads_first

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v)

    return call


def flex(case: Case) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import flex_attention, noop_mask

    q, k, v = case.heads_first
    mask = block_mask(case.kept, q.shape[2], DRAWN).to_flex_attention(q.shape[2])
    mask.mask_mod = noop_mask  # it is asked about partly kept blocks only, and each density's own would compile anew
    call = compiled(flex_attention)
    return lambda: call(q, k, v, block_mask=mask)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def in_fp8(*tensors: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors in FP8, and the scale of each, (), float32."""
    scales = [x.abs().amax().float() / torch.finfo(FP8).max for x in tensors]
    return [(x.float() / scale).to(FP8) for x, scale in zip(tensors, scales, strict=True)], scales


def out_of_fp8(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return (codes.float() * scale).to(dtype)


def cudnn_fp8(case: Case) -> Callable[[], Tensor]:
    like = case.model[0]
    graph, ports = cudnn_fp8_graph(wanted("cudnn", "; the package is nvidia-cudnn-frontend"), like)
    quantise, restore = compiled(in_fp8), compiled(out_of_fp8)
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=like.device)
    numerators = [torch.full((), scale, device=like.device) for scale in (1 / NUMERATORS, NUMERATORS)]
    largest = [torch.empty((), device=like.device) for _ in range(2)]

    def call() -> Tensor:
        codes, scales = quantise(*case.model)
        out, out_scale = torch.empty_like(codes[0]), scales[2]  # means of V's rows are in V's range
        buffers = (*codes, *scales, *numerators, out_scale.reciprocal(), out, *largest)
        graph.execute(dict(zip(ports, buffers, strict=True)), workspace)
        return restore(out, out_scale, like.dtype).transpose(1, 2)

    return call


def cudnn_fp8_graph(cudnn: Any, like: Tensor) -> tuple[Any, list[Any]]:
    """Attention over FP8 tensors like one of (B, N, H, D), on the default stream, and the tensors that a call names.

    In their order: q, k and v; their scales; scale and inverse scale of softmax's numerators; inverse scale of the
    output; the output, which on Hopper can only be FP8; the largest numerator and the largest output, which go unused.
    """
    codes, floats = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    tokens = like.transpose(1, 2)
    whole = {"dim": tuple(tokens.shape), "stride": tokens.stride()}
    single = {"dim": (1, 1, 1, 1), "stride": (1, 1, 1, 1)}
    graph = cudnn.pygraph(io_data_type=codes, intermediate_data_type=floats, compute_data_type=floats)
    names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
    operands = {name: graph.tensor(name=name, data_type=codes, **whole) for name in ("q", "k", "v")}
    operands |= {name: graph.tensor(name=name, data_type=floats, **single) for name in names}
    out, _, *largest = graph.sdpa_fp8(**operands, attn_scale=like.shape[-1] ** -0.5, generate_stats=False)
    for port, form, place in ((out, codes, whole), *((port, floats, single) for port in largest)):
        port.set_output(True).set_dim(place["dim"]).set_stride(place["stride"]).set_data_type(form)
    graph.build([cudnn.heur_mode.A])
    return graph, [*operands.values(), out, *largest]


def sage2(case: Case) -> Callable[[], Tensor]:
    module = wanted("sageattention")
    q, k, v = case.heads_first
    return lambda: module.sageattn(q, k, v, tensor_layout="HND")


def sparge(case: Case) -> Callable[[], Tensor]:
    module = wanted("spas_sage_attn")
    q, k, v = case.heads_first
    mask = case.mask(64, 128).to(torch.int8)
    return lambda: module.block_sparse_sage2_attn_cuda(q, k, v, mask_id=mask, tensor_layout="HND")


def paro_authors(case: Case) -> Callable[[], Tensor]:
    kernel, quant = wanted("paroattention._qattn_sm80"), wanted("paroattention.quant")
    q, k, v = case.heads_first
    mask = case.mask(64, 64)

    def call() -> Tensor:
        q_, q_scale, k_, k_scale = quant.per_warp_int8(q, k, BLKQ=64, WARPQ=32, BLKK=64, tensor_layout="HND")
        out = torch.empty_like(q)
        heads_first, not_causal, per_warp, no_lse = 1, 0, 2, 0
        kernel.qk_int8_sv_f16_accum_f16_attn(
            q_, k_, v.to(torch.float16), out, q_scale, k_scale,
            heads_first, not_causal, per_warp, q.shape[-1] ** -0.5, no_lse, mask,
        )  # fmt: skip
        return out

    return call


def flash3(case: Case) -> Callable[[], Tensor]:
    attend = wanted("flash_attn_interface", NO_WHEEL).flash_attn_func
    q, k, v = case.model
    return lambda: attend(q, k, v).transpose(1, 2)


def flash3_fp8(case: Case) -> Callable[[], Tensor]:
    attend = wanted("flash_attn_interface", NO_WHEEL).flash_attn_func
    quantise = compiled(in_fp8)
    batch, _, heads, _ = case.model[0].shape

    def call() -> Tensor:
        (q, k, v), scales = quantise(*case.model)
        of_q, of_k, of_v = (scale.expand(batch, heads) for scale in scales)
        return attend(q, k, v, q_descale=of_q, k_descale=of_k, v_descale=of_v).transpose(1, 2)

    return call


def flash4(case: Case) -> Callable[[], Tensor]:
    interface = wanted("flash_attn.cute")
    q, k, v = case.model
    return lambda: interface.flash_attn_func(q, k, v)[0].transpose(1, 2)


def wanted(name: str, remark: str = "") -> Any:
    """Import a module of a peer; `remark` ends the reason if that fails.

    Raises:
        Missing: If it is not installed, or not for this machine.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise Missing(f"{name} cannot be imported: {error}{remark}") from error


PEERS = {
    "cudnn": Peer(partial(sdpa, SDPBackend.CUDNN_ATTENTION), "bf16/bf16"),
    "cudnn-fp8": Peer(cudnn_fp8, "fp8/fp8"),
    "flash2": Peer(partial(sdpa, SDPBackend.FLASH_ATTENTION), "bf16/bf16"),
    "flash3": Peer(flash3, "bf16/bf16"),
    "flash3-fp8": Peer(flash3_fp8, "fp8/fp8"),
    "flash4": Peer(flash4, "bf16/bf16"),
    "flex": Peer(flex, "bf16/bf16", "128x128"),
    "sage2": Peer(sage2, "int8/fp8"),
    "sparge": Peer(sparge, "int8/fp8", "64x128"),
    "paro-authors": Peer(paro_authors, "int8/fp16", "64x64"),
}
