"""One pooled token in place of every dropped block: its mean key and value, counted once for each of its tokens.

Where it helps is a matter of the head, of the phase, and of the block: a mean key stands for keys that RoPE has turned
apart. A calibration tells, on the dense model's own q, k and v: whether a head of a phase errs less with the tokens of
all its dropped blocks (`heads`), or which blocks err less with a token than without, each taken alone (`blocks`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from paroattn.block_mask import BlockMask, blocks_of
from paroattn.grid import Layout
from paroattn.integration.apply import recording
from paroattn.integration.generate import run
from paroattn.integration.projection import output_projection
from paroattn.kernels.reference import to_model_order
from paroattn.plan.plan import TransformerPlan
from standing_in import Place, clips_of, instead

ROWS = {"cpu": 4, "cuda": 16}
"""Query blocks at once."""
Where = tuple[str, int]
"""A layer and a phase."""


@dataclass(frozen=True)
class Pooled:
    """Mean keys and values of the blocks, (heads, Nk, D) each, and the logarithm of their tokens, (Nk,)."""

    keys: Tensor
    values: Tensor
    bias: Tensor

    @classmethod
    def of(cls, k: Tensor, v: Tensor, block: int) -> "Pooled":
        """Of keys and values (heads, N, D) in kernel order."""
        tokens = k.shape[1]
        sizes = torch.full((blocks_of(tokens, block),), float(block), device=k.device)
        sizes[-1] = tokens - (len(sizes) - 1) * block
        keys, values = (
            pad(x, (0, 0, 0, -tokens % block)).unflatten(1, (-1, block)).sum(2) / sizes[:, None] for x in (k, v)
        )
        return cls(keys, values, sizes.log())


def attended(q: Tensor, k: Tensor, v: Tensor, kept: Tensor, pooled: Tensor | None, block: tuple[int, int]) -> Tensor:
    """Attention of one clip over kept blocks, and over one token of each block in `pooled`.

    Args:
        q, k, v: (heads, N, D) in kernel order.
        kept, pooled: bool (heads, Nq, Nk); no block is in both.
        block: Tokens of a query block and of a key block.

    Returns:
        (heads, N, D).
    """
    tokens, out = q.shape[1], torch.empty_like(q)
    tokens_of, q = Pooled.of(k, v, block[1]), q * q.shape[-1] ** -0.5
    for rows, blocks in _chunks(kept.shape[1], block[0], q):
        wide = kept[:, blocks].repeat_interleave(block[0], 1)[:, : q[:, rows].shape[1]]
        scores = (q[:, rows] @ k.mT).masked_fill_(~wide.repeat_interleave(block[1], 2)[..., :tokens], -torch.inf)
        if pooled is None:
            out[:, rows] = scores.softmax(-1) @ v
            continue
        stand = pooled[:, blocks].repeat_interleave(block[0], 1)[:, : scores.shape[1]]
        more = (q[:, rows] @ tokens_of.keys.mT + tokens_of.bias).masked_fill_(~stand, -torch.inf)
        weights = torch.cat([scores, more], -1).softmax(-1)
        out[:, rows] = weights[..., :tokens] @ v + weights[..., tokens:] @ tokens_of.values
    return out


def block_errors(q: Tensor, k: Tensor, v: Tensor, w_o: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Output error of dropping each block alone, and of one token in its place, (heads, Nq, Nk) each.

    With A and m what the block adds to a row's output and to its attention, and B and n the same of the token:
    ‖(A − m o) W_o‖² and ‖((A − m o) − (B − n o)) W_o‖², summed over the rows of the query block.
    """
    tokens, (height, width) = q.shape[1], block
    v, q = v @ _root(w_o), q * q.shape[-1] ** -0.5
    pooled, padding = Pooled.of(k, v, width), (0, 0, 0, -tokens % width)
    values = pad(v, padding).unflatten(1, (-1, width))
    found: list[list[Tensor]] = [[], []]
    for rows, _ in _chunks(blocks_of(tokens, height), height, q):
        scores = q[:, rows] @ k.mT
        lse = scores.logsumexp(-1, keepdim=True)
        p = pad((scores - lse).exp(), (0, -tokens % width)).unflatten(-1, (-1, width))
        mass, added = p.sum(-1), torch.einsum("hrjn,hjnd->hrjd", p, values)
        output = added.sum(2, keepdim=True)
        moved = added - mass[..., None] * output
        stand_in = (q[:, rows] @ pooled.keys.mT + pooled.bias - lse).exp()
        left = moved - stand_in[..., None] * (pooled.values[:, None] - output)
        for kind, each in zip(found, (moved, left), strict=True):
            squares = pad(each.square().sum(-1), (0, 0, 0, -each.shape[1] % height))
            kind.append(squares.unflatten(1, (-1, height)).sum(2))
    without, with_token = (torch.cat(each, 1) for each in found)
    return without, with_token


def _chunks(query_blocks: int, height: int, q: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and query blocks, some at a time."""
    some = ROWS.get(q.device.type, 4)
    for first in range(0, query_blocks, some):
        last = min(query_blocks, first + some)
        yield slice(first * height, min(q.shape[1], last * height)), slice(first, last)


def _root(w_o: Tensor) -> Tensor:
    """S with ‖x S‖ = ‖x W_o‖, (heads, D, D)."""
    values, vectors = torch.linalg.eigh(w_o.double() @ w_o.double().mT)
    return (vectors * values.clamp_min(0).sqrt()[:, None]).to(w_o.dtype)


@dataclass
class Compensation:
    """What a calibration found of pooled tokens, under one plan.

    Attributes:
        plan: The plan.
        with_tokens, without: Squared output error of every head with all tokens and with none, by layer and phase.
        gains: What a token takes off the error of dropping each block, by layer and phase; below 0 where it adds.
    """

    plan: TransformerPlan
    with_tokens: dict[Where, Tensor] = field(default_factory=dict)
    without: dict[Where, Tensor] = field(default_factory=dict)
    gains: dict[Where, Tensor] = field(default_factory=dict)

    def add(self, layer: str, phase: int, q: Tensor, k: Tensor, v: Tensor, w_o: Tensor) -> None:
        """Add what one clip's q, k, v (heads, N, D) in kernel order show."""
        mask, block = self.plan.layers[layer].mask[phase], self.plan.block
        kept = mask.dense().to(q.device)
        exact = attended(q, k, v, torch.ones_like(kept), None, block)
        for sums, pooled in ((self.with_tokens, ~kept), (self.without, None)):
            error = ((attended(q, k, v, kept, pooled, block) - exact) @ w_o).square().sum((1, 2))
            sums[layer, phase] = sums.get((layer, phase), 0) + error
        alone, with_token = block_errors(q, k, v, w_o, block)
        self.gains[layer, phase] = self.gains.get((layer, phase), 0) + (alone - with_token)

    def pooled(self, layer: str, phase: int, choice: str) -> Tensor:
        """Dropped blocks that get a token, bool (heads, Nq, Nk): "all", those of some "heads", or some "blocks"."""
        dropped = ~self.plan.layers[layer].mask[phase].dense()
        if choice == "all" or (layer, phase) not in self.gains:
            return dropped & (choice == "all")
        helped = (self.with_tokens[layer, phase] < self.without[layer, phase]).cpu()[:, None, None]
        return dropped & (helped if choice == "heads" else (self.gains[layer, phase] > 0).cpu())

    def share(self, choice: str) -> float:
        """Of the dropped blocks, how many get a token."""
        places = [(layer, phase) for layer in self.plan.layers for phase in range(len(self.plan.phases))]
        pooled = sum(int(self.pooled(*place, choice).sum()) for place in places)
        return pooled / max(1, sum(int((~layer.mask.dense()).sum()) for layer in self.plan.layers.values()))


CHOICES = ("all", "heads", "blocks")


def looked_at(pipe: Any, plan: TransformerPlan, prompts: Sequence[str], steps: int, **call: Any) -> Compensation:
    """What pooled tokens do to the attention of dense clips under a plan; arguments as in `collect`."""
    found = Compensation(plan)
    orders = tuple(sorted({order for layer in plan.layers.values() for order in layer.orders}))
    tables: dict[Any, Tensor] = {}

    def observe(layer: str, attn: Any, q: Tensor, k: Tensor, v: Tensor, level: float, *rest: Any) -> None:
        table = tables.setdefault(q.device, Layout(plan.grid).table(orders).to(q.device))
        order = torch.tensor([orders.index(each) for each in plan.layers[layer].orders], device=q.device)
        w_o = output_projection(rest[-1], layer, attn, device=q.device)
        for clip in clips_of(q, k, v, table, order):
            found.add(layer, plan.phase_at(level), *clip, w_o)

    with recording(pipe, observe):
        for seed, prompt in enumerate(prompts):
            run(pipe, prompt, seed, steps=steps, output_type="latent", **call)
    return found


@contextmanager
def compensated(transformer: Any, found: Compensation, choice: str | None) -> Iterator[None]:
    """Let a model that runs by the plan attend to pooled tokens too; with None, the same arithmetic without any."""
    masks: dict[tuple[Where, Any], Tensor] = {}

    def attend(
        place: Place, q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, *, table: Tensor, order: Tensor, **_: Any
    ) -> Tensor:
        where = place.layer, place.hook.call.phase
        if choice is not None and (where, q.device) not in masks:
            masks[where, q.device] = found.pooled(*where, choice).to(q.device)
        kept, pooled = mask.dense(), masks.get((where, q.device))
        out = torch.stack([attended(*clip, kept, pooled, mask.block) for clip in clips_of(q, k, v, table, order)])
        return to_model_order(out, table, order).to(q.dtype)

    with instead(transformer, attend):
        yield
