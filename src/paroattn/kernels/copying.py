"""The copy behind `dealing` on a GPU: rows of one token and head, read or written where a rank's heads lie."""

import triton
import triton.language as tl
from torch import Tensor

ROWS, WARPS = 32, 4


@triton.jit
def _copy_kernel(
    x_ptr, dealt_ptr, heads_ptr, stride_b, stride_n, stride_h,
    N, B, EACH,
    BACK: tl.constexpr, D: tl.constexpr, D_PAD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A few rows (token, batch element, head) of what one rank gets; grid (row blocks, ranks)."""
    rank = tl.program_id(1).to(tl.int64)
    row, d = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS), tl.arange(0, D_PAD)
    real = row < N.to(tl.int64) * B * EACH
    b, n = row // EACH % B, row // EACH // B
    head = tl.load(heads_ptr + rank * EACH + row % EACH, mask=real, other=0).to(tl.int64)
    there = (b * stride_b + n * stride_n + head * stride_h)[:, None] + d[None, :]
    here = (rank * N * B * EACH + row)[:, None] * D + d[None, :]
    some = real[:, None] & (d < D)[None, :]
    if BACK:
        tl.store(x_ptr + there, tl.load(dealt_ptr + here, mask=some), mask=some)
    else:
        tl.store(dealt_ptr + here, tl.load(x_ptr + there, mask=some), mask=some)


def copy(x: Tensor, dealt: Tensor, heads: Tensor, *, back: bool) -> None:
    """Copy x (B, N, H, D) to dealt (ranks, N, B, heads of each, D), or `back`."""
    ranks, tokens, batch, each, channels = dealt.shape
    x = x if x.stride(3) == 1 else x.contiguous()
    _copy_kernel[(triton.cdiv(tokens * batch * each, ROWS), ranks)](
        x, dealt, heads, *x.stride()[:3], tokens, batch, each,
        BACK=back, D=channels, D_PAD=triton.next_power_of_2(channels), ROWS=ROWS, num_warps=WARPS,
    )  # fmt: skip
