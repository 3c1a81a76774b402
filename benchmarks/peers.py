"""Other attention kernels, each behind one function: q, k, v (B, N, H, D) and a mask in, a call to time out.

A function takes a `Case` and returns a call without arguments, whose result is (B, H, N, D); it raises `Missing`, with
the reason, where the peer cannot run. Peers get contiguous (B, H, N, D) tensors and a mask in their own form, both made
before the clock starts, and read the tokens in the model's order: reordering is not among what is timed. All else that
they need per call is: smoothing, quantising, transposing, index lists.
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
    from torch.nn.attention.flex_attention import noop_mask

    q, k, v = case.heads_first
    mask = block_mask(case.kept, q.shape[2], DRAWN).to_flex_attention(q.shape[2])
    mask.mask_mod = noop_mask  # it is asked about partly kept blocks only, and each density's own would compile anew
    compiled = compiled_flex()
    return lambda: compiled(q, k, v, block_mask=mask)


@cache
def compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


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
    interface = wanted("flash_attn_interface", "; no wheel of it is published")
    q, k, v = case.model
    return lambda: interface.flash_attn_func(q, k, v).transpose(1, 2)


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
    "flash2": Peer(partial(sdpa, SDPBackend.FLASH_ATTENTION), "bf16/bf16"),
    "flash3": Peer(flash3, "bf16/bf16"),
    "flash4": Peer(flash4, "bf16/bf16"),
    "flex": Peer(flex, "bf16/bf16", "128x128"),
    "sage2": Peer(sage2, "int8/fp8"),
    "sparge": Peer(sparge, "int8/fp8", "64x128"),
    "paro-authors": Peer(paro_authors, "int8/fp16", "64x64"),
}
