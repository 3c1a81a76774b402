"""Which key blocks a query block reads, one bit a block, and the same for kernels of other projects.

Bits are packed along the key blocks, lowest bit first, so bit j % 8 of byte j // 8 belongs to key block j. Leading
dimensions are free: (heads, …) for one call, (phases, heads, …) in a plan. Exports are for q, k and v in kernel order.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

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
    _launch_order: Tensor | None = field(default=None, repr=False)

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
        return cls(_packed(kept), kept.shape[-1], block)

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
    def shape(self) -> tuple[int, ...]:
        """(…, heads, query blocks, key blocks)."""
        return (*self.bits.shape[:-1], self.key_blocks)

    @property
    def heads(self) -> int:
        return self.shape[-3]

    @property
    def query_blocks(self) -> int:
        return self.shape[-2]

    @property
    def density(self) -> float:
        """Kept blocks over all blocks, 0…1."""
        return self.head_density().mean().item()

    def head_density(self) -> Tensor:
        """Density of each head, (…, heads) float64."""
        pairs = self.bits - (self.bits >> 1 & 0x55)
        fours = (pairs & 0x33) + (pairs >> 2 & 0x33)
        kept = (fours + (fours >> 4)) & 0x0F
        return kept.sum((-2, -1)).double() / (self.query_blocks * self.key_blocks)

    def dense(self) -> Tensor:
        """Unpack to bool of shape (…, heads, query blocks, key blocks)."""
        shifts = torch.arange(8, dtype=torch.uint8, device=self.bits.device)
        return ((self.bits[..., None] >> shifts) & 1).bool().flatten(-2)[..., : self.key_blocks]

    def __getitem__(self, phase: int) -> "BlockMask":
        """The mask of one phase."""
        return BlockMask(self.bits[phase], self.key_blocks, self.block)

    def to(self, device: torch.device | str) -> "BlockMask":
        return BlockMask(self.bits.to(device), self.key_blocks, self.block)

    @property
    def launch_order(self) -> Tensor:
        """Order in which kernels start on query blocks, made at the first use and kept; inside torch.compile not kept.

        Returns:
            head · Nq + query block, (H · Nq,) int32: the densest head first, and the longest rows of a head first, so
            that what runs together shares keys and what runs last is short.
        """
        if self._launch_order is not None:
            return self._launch_order
        self._check_one_phase()
        counts = self.dense().sum(-1)  # (H, Nq)
        heads = counts.sum(-1).argsort(descending=True, stable=True)
        rows = counts.argsort(descending=True, stable=True)
        made = (heads[:, None] * self.query_blocks + rows[heads]).flatten().to(torch.int32)
        if not torch.compiler.is_compiling():
            object.__setattr__(self, "_launch_order", made)
        return made

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

        The block in which video and text meet and every block after it are kept, as rows and as columns. On a GPU
        nothing waits for it.

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
        return BlockMask(_packed(whole), whole.shape[-1], self.block)

    def refine(self, block: tuple[int, int], tokens: int) -> "BlockMask":
        """The same mask in smaller blocks: each keeps what the block around it keeps.

        Args:
            block: Tokens of a query block and of a key block; they divide this mask's.
            tokens: Length of the sequence.

        Raises:
            ValueError: If the blocks do not divide this mask's, or the mask is not over `tokens`.
        """
        self._check_tokens(tokens)
        if any(own % size for own, size in zip(self.block, block, strict=True)):
            raise ValueError(
                f"finer blocks must divide {_written(self.block)}; got {_written(block)}. Coarser blocks keep more "
                "than this mask: make another plan for them."
            )
        kept = self.dense()
        for axis, own, size in ((-2, self.block[0], block[0]), (-1, self.block[1], block[1])):
            kept = kept.repeat_interleave(own // size, axis).narrow(axis, 0, blocks_of(tokens, size))
        return BlockMask.from_dense(kept, block)

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

    def to_sparge_attention(self, capability: tuple[int, int], batch: int = 1) -> Tensor:
        """Export to SpargeAttn.

        Args:
            capability: Compute capability of the GPU. Its kernel for 9.0 has blocks of 64×128 tokens, that for the
                others 128×64.
            batch: Batch size of q.

        Returns:
            `mask_id` of `block_sparse_sage2_attn_cuda`: int8 (B, H, Nq, Nk), contiguous, 1 where a block is kept.

        Raises:
            ValueError: If the kernel has other blocks, or the mask is of several phases.

        Source:
            spas_sage_attn/core.py and utils.py of thu-ml/SpargeAttn at bfd980b.
        """
        self._check_one_phase()
        needed = (64, 128) if capability == (9, 0) else (128, 64)
        if self.block != needed:
            gpu = ".".join(map(str, capability))
            raise ValueError(
                f"SpargeAttn needs blocks of {_written(needed)} on compute capability {gpu}; got "
                f"{_written(self.block)}. {self._remedy(needed)}"
            )
        return self.dense().to(torch.int8)[None].repeat(batch, 1, 1, 1)

    def to_flash_attention_4(self, tile: tuple[int, int] = (128, 128)) -> dict[str, Any]:
        """Export to FlashAttention-4, in full blocks only.

        Args:
            tile: Query and key tokens of one pass of the GPU's kernel: (128, 128) on compute capability 9.0 and
                (256, 128) on 10.0, for D = 64 and 128. Query blocks are multiples of it, and key blocks equal to it.

        Returns:
            Arguments of `flash_attn.cute.block_sparsity.BlockSparseTensorsTorch`: full_block_cnt (1, H, Nq) and
            full_block_idx (1, H, Nq, Nk) int32, rising; mask_block_cnt, all 0, and mask_block_idx of the same shapes;
            block_size. The 1 stands for every batch element. Which keys are padding goes separately, as `seqused_k`.

        Raises:
            ValueError: If the kernel cannot take the blocks, or the mask is of several phases.

        Source:
            flash_attn/cute/block_sparsity.py and interface.py of Dao-AILab/flash-attention at 0251105.
        """
        self._check_one_phase()
        if self.block[0] % tile[0] or self.block[1] != tile[1]:
            raise ValueError(
                f"FlashAttention-4 needs query blocks that are multiples of {tile[0]} tokens and key blocks of "
                f"{tile[1]}; got {_written(self.block)}. {self._remedy(tile)}"
            )
        counts, indices = (part[None] for part in self.key_lists())
        full = {"full_block_cnt": counts, "full_block_idx": indices}
        return full | {
            "mask_block_cnt": torch.zeros_like(counts), "mask_block_idx": indices, "block_size": self.block,
        }  # fmt: skip

    def to_flashinfer(self, tokens: int) -> dict[str, Tensor]:
        """Export to FlashInfer, all heads at once and any number of tokens.

        Returns:
            The first arguments of `VariableBlockSparseAttentionWrapper.plan`: block_mask_map (H, Nq, Nk) bool,
            block_row_sz (H, Nq) int32 and block_col_sz (H, Nk) int32, the tokens of each block. Its `run` wants q, k
            and v as (H, N, D), one batch element.

        Raises:
            ValueError: If the mask is not over `tokens`, or of several phases.

        Source:
            flashinfer/sparse.py of flashinfer-ai/flashinfer at fb28d72.
        """
        self._check_one_phase()
        self._check_tokens(tokens)
        rows, columns = (
            torch.full((self.heads, count), size, dtype=torch.int32, device=self.bits.device)
            for count, size in ((self.query_blocks, self.block[0]), (self.key_blocks, self.block[1]))
        )
        for sizes, size in ((rows, self.block[0]), (columns, self.block[1])):
            sizes[:, -1] = tokens - (sizes.shape[1] - 1) * size
        return {"block_mask_map": self.dense(), "block_row_sz": rows, "block_col_sz": columns}

    def to_flashinfer_bsr(self, tokens: int, head: int) -> dict[str, Any]:
        """Export one head to FlashInfer as a block-sparse matrix in rows.

        Returns:
            The first arguments of `BlockSparseAttentionWrapper.plan`: indptr (Nq + 1,) and indices (kept,), int32 and
            rising in each row; M = N = `tokens`; R and C, the block. Its `run` wants q, k and v as (N, 1, D).

        Raises:
            ValueError: If the last key block is not whole, the mask is not over `tokens`, or of several phases.

        Source:
            flashinfer/sparse.py of flashinfer-ai/flashinfer at fb28d72.
        """
        self._check_one_phase()
        self._check_tokens(tokens)
        rows, columns = self.block
        if tokens % columns:
            fitting = (rows, math.gcd(tokens, columns))
            raise ValueError(
                f"FlashInfer's block-sparse matrix needs tokens that are a multiple of the key block, {columns}; got "
                f"{tokens}. Export mask.refine({fitting}, {tokens}), or use to_flashinfer."
            )
        kept = self.dense()[head]
        indptr = torch.zeros(self.query_blocks + 1, dtype=torch.int32, device=kept.device)
        indptr[1:] = kept.sum(-1).cumsum(-1)
        indices = kept.nonzero()[:, 1].to(torch.int32)
        return {"indptr": indptr, "indices": indices, "M": tokens, "N": tokens, "R": rows, "C": columns}

    def _check_one_phase(self) -> None:
        if self.bits.ndim != 3:
            raise ValueError(
                f"the mask must be one phase's, (H, Nq, Nk); got {self.bits.ndim} dimensions. Use mask[phase]."
            )

    def _check_tokens(self, tokens: int) -> None:
        rows, columns = (blocks_of(tokens, size) for size in self.block)
        if (self.query_blocks, self.key_blocks) != (rows, columns):
            raise ValueError(
                f"the mask must cover {rows}×{columns} blocks of {_written(self.block)} for {tokens} tokens; got "
                f"{self.query_blocks}×{self.key_blocks}. BlockMask.with_text adds text to a mask over video."
            )

    def _remedy(self, block: tuple[int, int]) -> str:
        """How to come to other blocks."""
        if any(own % size for own, size in zip(self.block, block, strict=True)):
            return f"Make the plan with blocks of {block[0]}x{block[1]}."
        return f"Export mask.refine({block}, tokens)."


def _packed(kept: Tensor) -> Tensor:
    """Bits of a boolean mask, lowest first."""
    padded = torch.nn.functional.pad(kept.view(torch.uint8), (0, -kept.shape[-1] % 8))
    bits = padded[..., ::8].clone(memory_format=torch.contiguous_format)
    for place in range(1, 8):
        bits |= padded[..., place::8] << place
    return bits


def _check_rows(rows: Tensor) -> None:
    empty = rows.any(-1).logical_not().nonzero()
    if len(empty):
        *_, head, row = empty[0].tolist()
        raise ValueError(f"every row must keep at least one block; head {head}, query block {row} keeps none")


def _written(block: tuple[int, int]) -> str:
    return f"{block[0]}×{block[1]}"


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
