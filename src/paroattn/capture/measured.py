"""What a calibration measures, and what comes out of measuring one self-attention."""

from dataclasses import dataclass

from torch import Tensor

from ..grid import ORDERS, check_order

ROUNDED = ("int8", "int4")
"""Precisions whose rounding errors are measured."""


@dataclass(frozen=True)
class CaptureSettings:
    """What to measure, and how finely to keep it.

    Attributes:
        orders: Candidate orders.
        block: Tokens of a query block and of a key block.
        row_stride: Measure one query row in so many; 1 measures all.
        block_stride: Measure one query block in so many, which is enough to choose orders; a mask needs all, 1.
        paper: Also measure what the paper's order score needs.
        codes: Keep the output error of a block as a logarithm in 8 bits, and of each row's masses the largest alone.
        whole_mass: With codes, keep every block's mass in 8 bits too, for plans that go by mass.
        rounding: Also measure, on one map of each layer and noise level, what INT8 and INT4 cost each head, for plans
            that choose between them.
    """

    orders: tuple[str, ...] = ORDERS
    block: tuple[int, int] = (64, 64)
    row_stride: int = 1
    block_stride: int = 1
    paper: bool = True
    codes: bool = False
    whole_mass: bool = False
    rounding: bool = True

    def __post_init__(self):
        if not self.orders or len(set(self.orders)) != len(self.orders):
            raise ValueError(f"candidate orders must be given and differ; got {self.orders}")
        for order in self.orders:
            check_order(order)
        if min(*self.block, self.row_stride, self.block_stride) < 1:
            raise ValueError(
                "block, row stride and block stride must be positive; "
                f"got {self.block}, {self.row_stride} and {self.block_stride}"
            )


@dataclass(frozen=True)
class BlockStats:
    """Statistics of one self-attention, summed over `calls` maps (batch, prompts, guidance branches).

    Attributes:
        mass: Post-softmax attention inside a block over its number of rows, (orders, H, Nq, Nk); of a sample, the
            measured query blocks only, (orders, H, S, Nk).
        error: Squared output error that dropping the block causes, likewise.
        sparse_share: Share of measured blocks with at least 90 % of entries below 1e-3, (orders, H).
        incoherence: Mean over measured blocks of max P / mean P, (orders, H).
        output_power: Σ over heads and all rows of ‖o_r W_o‖²; of a sample, estimated from its rows.
        calls: How many maps were summed.
        rows: Query blocks that were measured, (S,), rising; None: all.
        rounding: Squared output error that rounding causes in each precision of `ROUNDED`, (precisions, H); of the
            first map alone. None: not measured.
    """

    mass: Tensor
    error: Tensor
    sparse_share: Tensor
    incoherence: Tensor
    output_power: Tensor
    calls: int
    rows: Tensor | None = None
    rounding: Tensor | None = None
