"""Several processes, one sequence: what diffusers' `enable_parallelism` has made of a model, and how tokens lie then.

diffusers splits video and text apart, so that after the exchange a joint sequence lies as rank 0's video and text, then
rank 1's. Kernels read it through the gather table, so nothing is moved for that.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..block_mask import BlockMask
from ..grid import Layout
from ..plan.balance import deal_heads, heads_each, kept_blocks
from ..plan.plan import PlanError, TransformerPlan
from .exchange import whole_mask

PARTS = 1
"""Parts of a rank's heads. With two, one computes while another travels; whether that is faster is not measured yet."""


@dataclass(frozen=True, eq=False)
class Ranks:
    """The processes that share a sequence.

    Attributes:
        config: diffusers' ParallelConfig.
        rank: This process among them.
        size: Their number.
        group: Name of their process group.
        ragged: Parts need not be equal.
    """

    config: Any
    rank: int
    size: int
    group: str
    ragged: bool

    def sizes(self, layout: Layout) -> tuple[int, ...]:
        """Tokens of every rank."""
        video, text = (self._parts(count) for count in (layout.grid.tokens, layout.text.tokens))
        return tuple(map(sum, zip(video, text, strict=True)))

    def own_tokens(self, layout: Layout) -> int:
        """Tokens of this rank, video and text."""
        return self.sizes(layout)[self.rank]

    def own_video(self, layout: Layout) -> int:
        """Video tokens of this rank."""
        return self._parts(layout.grid.tokens)[self.rank]

    def arrived(self, layout: Layout) -> Tensor:
        """The model's positions in the order in which tokens lie after the exchange, (tokens,) int64."""
        first, second = layout.grid.tokens, layout.text.tokens
        if layout.text.side == "prefix":
            first, second = second, first
        parts = (torch.arange(first), torch.arange(second) + first)
        mine = [part.split(self._parts(len(part))) for part in parts]
        return torch.cat([piece for pieces in zip(*mine, strict=True) for piece in pieces])

    def places(self, layout: Layout) -> Tensor:
        """Where each of the model's positions lies after the exchange, (tokens,) int64."""
        return self.arrived(layout).argsort()

    def whole_mask(self, mask: Tensor, sizes: tuple[int, ...], places: Tensor) -> Tensor:
        """A mask over own keys, or over all, (B, …, keys), as one over all in the model's order, (B, tokens)."""
        mask = mask.flatten(1)
        return mask if mask.shape[1] == sum(sizes) else whole_mask(mask, sizes, self.group)[:, places]

    def arrived_mask(self, mask: Tensor, layout: Layout) -> Tensor:
        """A mask over own keys, or over all, as one over all in the order in which they arrive, (B, 1, 1, tokens).

        diffusers takes a mask over all keys as it is, and mixes up masks over unequal parts.
        """
        places = self.places(layout).to(mask.device)
        return self.whole_mask(mask, self.sizes(layout), places)[:, None, None, places.argsort()]

    def check_plan(self, plan: TransformerPlan, device: torch.device, *settings: Any) -> None:
        """Check that all ranks follow the same plan, which they must ask at the same time.

        Raises:
            PlanError: If a rank has another plan or settings.
        """
        mine = torch.frombuffer(bytearray(plan.digest(*settings), "ascii"), dtype=torch.uint8).to(device)
        all_ = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(all_, mine, self._process_group)
        others = [rank for rank, each in enumerate(all_) if not torch.equal(each, all_[0])]
        if others:
            raise PlanError(
                f"all ranks must follow one plan with the same settings; rank {others[0]} follows another one than "
                "rank 0. Give every process the same plan."
            )

    def check_heads(self, heads: int) -> None:
        """Check that heads can be dealt to the ranks.

        Raises:
            PlanError: If they cannot.
        """
        try:
            heads_each(heads, self.size)
        except ValueError as error:
            raise PlanError(str(error)) from error

    def check_layout(self, layout: Layout) -> None:
        """Check that tokens can be split.

        Raises:
            PlanError: If they cannot.
        """
        for what, tokens in {"video": layout.grid.tokens, "text": layout.text.tokens}.items():
            if tokens % self.size and not self.ragged:
                raise PlanError(
                    f"{self.size} ranks must divide the {tokens} {what} tokens. "
                    f"ContextParallelConfig(ulysses_degree={self.size}, ulysses_anything=True) splits any number."
                )

    def deal(self, mask: BlockMask) -> list[Tensor]:
        """Heads of every rank for one phase of a layer, by its mask, in parts: (ranks, heads) int64 each."""
        costs = kept_blocks(mask).tolist()
        dealt = [sorted(heads, key=lambda head: (-costs[head], head)) for heads in deal_heads(costs, self.size)]
        return [torch.tensor([heads[part::PARTS] for heads in dealt]) for part in range(min(PARTS, len(dealt[0])))]

    @cached_property
    def _process_group(self) -> Any:
        return self.config.context_parallel_config._ulysses_mesh.get_group()

    def _parts(self, tokens: int) -> list[int]:
        """How diffusers splits a stream: the first ranks get one more."""
        each, left = divmod(tokens, self.size)
        return [each + (rank < left) for rank in range(self.size)]


def ranks_of(transformer: nn.Module) -> Ranks | None:
    """The ranks that a transformer is split over, if it is.

    Raises:
        ValueError: If it is split in a way that a plan cannot follow.
    """
    config: Any = getattr(transformer, "_parallel_config", None)
    if config is None:
        return None
    context = getattr(config, "context_parallel_config", None)
    if context is None or context.ring_degree > 1:
        kind = "tensor" if context is None else "ring"
        raise ValueError(
            f"a plan needs whole sequences, so a model may be split with Ulysses only; this one has {kind} "
            "parallelism. Use ContextParallelConfig(ulysses_degree=…)."
        )
    group = context._ulysses_mesh.get_group()
    return Ranks(
        config, dist.get_rank(group), dist.get_world_size(group), group.group_name, bool(context.ulysses_anything)
    )
