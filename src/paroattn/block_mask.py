"""Which key blocks a query block reads, one bit a block.

Bits are packed along the key blocks, lowest bit first, so bit j % 8 of byte j // 8 belongs to key block j. Leading
dimensions are free: (heads, …) for one call, (phases, heads, …) in a plan.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor


def parse_block(text: str) -> tuple[int, int]:
    """Read "64x128" (query × key tokens), or "64" for both.

    Raises:
        ValueError: If the text has another form.
    """
    if not re.fullmatch(r"[1-9]\d{0,3}(x[1-9]\d{0,3})?", text):
        raise ValueError(f"a block is written QUERYxKEY in tokens, such as 64x64; got {text!r}")
    query, key = (text.split("x") * 2)[:2]
    return int(query), int(key)


def blocks_of(tokens: int, block: int) -> int:
    """Number of blocks that cover `tokens`."""
    return -(-tokens // block)


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Kept blocks of every head.

    Attributes:
        bits: Packed bits, uint8 of shape (…, heads, query blocks, ⌈key blocks / 8⌉).
        key_blocks: Number of key blocks.
        block: Tokens of a query block and of a key block.
    """

    bits: Tensor
    key_blocks: int
    block: tuple[int, int]

    def __post_init__(self):
        if self.bits.dtype != torch.uint8 or self.bits.ndim < 3:
            raise ValueError(f"packed bits must be uint8 of shape (…, H, Nq, bytes); got {_describe(self.bits)}")
        if self.bits.shape[-1] != blocks_of(self.key_blocks, 8):
            needed = blocks_of(self.key_blocks, 8)
            raise ValueError(f"{self.key_blocks} key blocks need {needed} bytes a row; got {self.bits.shape[-1]}")

    @classmethod
    def from_dense(cls, kept: Tensor, block: tuple[int, int]) -> "BlockMask":
        """Pack a boolean mask.

        Args:
            kept: bool of shape (…, heads, query blocks, key blocks).
            block: Tokens of a query block and of a key block.

        Raises:
            ValueError: If a row keeps no block; the message names head and row.
        """
        if kept.dtype != torch.bool or kept.ndim < 3:
            raise ValueError(f"a block mask must be bool of shape (…, H, Nq, Nk); got {_describe(kept)}")
        _check_rows(kept)
        padded = torch.nn.functional.pad(kept, (0, -kept.shape[-1] % 8)).unflatten(-1, (-1, 8))
        weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=kept.device)
        return cls((padded * weights).sum(-1, dtype=torch.uint8), kept.shape[-1], block)

    @classmethod
    def full(cls, heads: int, tokens: int, block: tuple[int, int]) -> "BlockMask":
        """Keep everything: dense attention."""
        shape = (heads, blocks_of(tokens, block[0]), blocks_of(tokens, block[1]))
        return cls.from_dense(torch.ones(shape, dtype=torch.bool), block)

    def check(self) -> None:
        """Check bits that came from elsewhere.

        Raises:
            ValueError: If a row keeps no block, or a bit beyond the key blocks is set.
        """
        _check_rows(self.bits)
        if self.key_blocks % 8 and (self.bits[..., -1] >> (self.key_blocks % 8)).any():
            raise ValueError(f"bits beyond the {self.key_blocks} key blocks must be 0")

    @property
    def heads(self) -> int:
        return self.bits.shape[-3]

    @property
    def query_blocks(self) -> int:
        return self.bits.shape[-2]

    @property
    def density(self) -> float:
        """Kept blocks over all blocks, 0…1."""
        return self.head_density().mean().item()

    def head_density(self) -> Tensor:
        """Density of each head, (…, heads) float64."""
        return self.dense().sum((-2, -1)).double() / (self.query_blocks * self.key_blocks)

    def dense(self) -> Tensor:
        """Unpack to bool of shape (…, heads, query blocks, key blocks)."""
        shifts = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        return ((self.bits[..., None] >> shifts) & 1).bool().flatten(-2)[..., : self.key_blocks]

    def __getitem__(self, phase: int) -> "BlockMask":
        """The mask of one phase."""
        return BlockMask(self.bits[phase], self.key_blocks, self.block)

    def to(self, device: torch.device | str) -> "BlockMask":
        return BlockMask(self.bits.to(device), self.key_blocks, self.block)

    def key_lists(self) -> tuple[Tensor, Tensor]:
        """Kept key blocks as lists.

        Returns:
            counts (…, heads, query blocks) and indices (…, heads, query blocks, key blocks), both int32; the first
            `counts` entries of a row are its kept blocks in rising order, the others are the dropped ones.
        """
        kept = self.dense()
        indices = kept.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
        return kept.sum(-1, dtype=torch.int32), indices.to(torch.int32)

    def with_text(self, video_tokens: int, text_tokens: int) -> "BlockMask":
        """Extend a mask over the video's blocks by dense text.

        The block in which video and text meet and every block after it are kept, as rows and as columns.

        Raises:
            ValueError: If this mask does not cover exactly the video's blocks.
        """
        rows, columns = (blocks_of(video_tokens, size) for size in self.block)
        if (self.query_blocks, self.key_blocks) != (rows, columns):
            raise ValueError(
                f"the mask must cover {rows}×{columns} blocks of {self.block[0]}×{self.block[1]} tokens for "
                f"{video_tokens} video tokens; got {self.query_blocks}×{self.key_blocks}"
            )
        if text_tokens == 0:
            return self
        total = video_tokens + text_tokens
        whole = torch.ones(
            *self.bits.shape[:-2], blocks_of(total, self.block[0]), blocks_of(total, self.block[1]),
            dtype=torch.bool, device=self.bits.device,
        )  # fmt: skip
        rows, columns = video_tokens // self.block[0], video_tokens // self.block[1]
        whole[..., :rows, :columns] = self.dense()[..., :rows, :columns]
        return BlockMask.from_dense(whole, self.block)

    def to_flex_attention(self, tokens: int, valid_tokens: Tensor | None = None):
        """Export to FlexAttention.

        Args:
            tokens: Length of the sequence in kernel order.
            valid_tokens: int tensor (B,): keys from there on are padding. None keeps all.

        Returns:
            `torch.nn.attention.flex_attention.BlockMask` for queries and keys in kernel order; its batch size is 1, or
            B with `valid_tokens`. It holds without torch.compile too, which reads its `mask_mod` and not its blocks.
        """
        from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

        kept, (rows, columns) = self.dense(), self.block
        counts, indices = (part[None] for part in self.key_lists())
        if valid_tokens is None:
            return FlexBlockMask.from_kv_blocks(
                torch.zeros_like(counts), indices, counts, indices, BLOCK_SIZE=self.block,
                mask_mod=lambda b, h, q, k: kept[h, q // rows, k // columns], seq_lengths=(tokens, tokens),
            )  # fmt: skip
        batch = valid_tokens.shape[0]
        return FlexBlockMask.from_kv_blocks(
            counts.repeat(batch, 1, 1), indices.repeat(batch, 1, 1, 1), BLOCK_SIZE=self.block,
            mask_mod=lambda b, h, q, k: kept[h, q // rows, k // columns] & (k < valid_tokens[b]),
            seq_lengths=(tokens, tokens),
        )  # fmt: skip


def _check_rows(rows: Tensor) -> None:
    empty = (rows == 0).all(-1).nonzero()
    if len(empty):
        *_, head, row = empty[0].tolist()
        raise ValueError(f"every row must keep at least one block; head {head}, query block {row} keeps none")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
