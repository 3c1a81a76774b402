"""Ideas that the quality benchmark tries: pooled tokens for dropped blocks, and statistics of a sparse model."""

import pytest
import torch
from tiny_models import random_plan, tiny_wan, wan_inputs

import compensation
import quality
from compensation import Compensation, attended, block_errors, compensated
from fidelity_demo import Bench
from paroattn.block_mask import blocks_of
from paroattn.demo.pipeline import MODEL
from paroattn.integration.apply import apply, remove

BLOCK = (8, 4)
TOKENS = 21  # the last query block has 5 rows, the last key block 1 token
pytestmark = pytest.mark.usefixtures("one_thread")


def operands(seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(3, TOKENS, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    kept = torch.rand(3, blocks_of(TOKENS, 8), blocks_of(TOKENS, 4), generator=generator) < 0.5
    kept[..., 1] = True
    return q, k + 1, v, kept, torch.randn(3, 6, 9, generator=generator, dtype=torch.float64)


def columns_of(block):
    return slice(4 * block, min(TOKENS, 4 * block + 4))


def one_row(q, k, v, row, kept, pooled):
    """Attention of one row of a head over whole blocks and single tokens in place of others."""
    weights, values = [], []
    for block in range(blocks_of(TOKENS, 4)):
        part = columns_of(block)
        if kept[row // 8, block]:
            weights += (q[row] @ k[part].mT / 6**0.5).exp().tolist()
            values += [*v[part]]
        elif pooled[row // 8, block]:
            weights.append(len(k[part]) * float((q[row] @ k[part].mean(0) / 6**0.5).exp()))
            values.append(v[part].mean(0))
    weights = torch.tensor(weights, dtype=torch.float64)
    return (weights[:, None] * torch.stack(values)).sum(0) / weights.sum()


@pytest.mark.parametrize("some", [1, 4])
def test_a_token_stands_for_all_tokens_of_its_block(some, monkeypatch):
    monkeypatch.setattr(compensation, "ROWS", {"cpu": some})
    q, k, v, kept, _ = operands()
    pooled = ~kept & (torch.arange(kept.shape[-1]) % 2 == 1)
    for tokens in (pooled, None):
        found = attended(q, k, v, kept, tokens, BLOCK)
        none = torch.zeros_like(kept) if tokens is None else tokens
        for head in range(3):
            wanted = [one_row(q[head], k[head], v[head], row, kept[head], none[head]) for row in range(TOKENS)]
            torch.testing.assert_close(found[head], torch.stack(wanted))


@pytest.mark.parametrize("some", [1, 4])
def test_errors_of_blocks_are_those_of_dropping_each_alone_to_first_order(some, monkeypatch):
    monkeypatch.setattr(compensation, "ROWS", {"cpu": some})
    q, k, v, kept, w_o = operands(1)
    everything, nothing = torch.ones_like(kept), torch.zeros_like(kept)
    exact = attended(q, k, v, everything, None, BLOCK)
    without, with_token = block_errors(q, k, v, w_o, BLOCK)
    p = (q @ k.mT / 6**0.5).softmax(-1)
    for block in range(kept.shape[-1]):
        one = nothing.clone()
        one[..., block] = True
        mass = p[..., columns_of(block)].sum(-1, keepdim=True)
        mean = k[:, columns_of(block)].mean(1, keepdim=True)
        lse = (q @ k.mT / 6**0.5).logsumexp(-1, keepdim=True)
        token = (q @ mean.mT / 6**0.5 - lse).exp() * len(range(TOKENS)[columns_of(block)])
        for found, pooled, left in ((without, None, 1 - mass), (with_token, one, 1 - mass + token)):
            moved = (attended(q, k, v, everything & ~one, pooled, BLOCK) - exact) * left @ w_o
            squares = moved.square().sum(-1)
            for rows in range(kept.shape[1]):
                wanted = squares[:, 8 * rows : 8 * rows + 8].sum(1)
                torch.testing.assert_close(found[:, rows, block], wanted)


def test_heads_and_blocks_get_tokens_where_these_helped():
    plan = random_plan(density=0.5, seed=4)
    layer, phase = "blocks.0.attn1", 0
    dropped = ~plan.layers[layer].mask[phase].dense()
    found = Compensation(plan)
    found.with_tokens[layer, phase] = torch.tensor([1.0, 3.0])
    found.without[layer, phase] = torch.tensor([2.0, 2.0])
    found.gains[layer, phase] = torch.where(torch.arange(dropped.shape[-1]) % 2 == 0, 1.0, -1.0).expand(dropped.shape)
    assert torch.equal(found.pooled(layer, phase, "all"), dropped)
    heads, each = (found.pooled(layer, phase, choice) for choice in ("heads", "blocks"))
    assert torch.equal(heads[0], dropped[0]) and dropped[1].any() and not heads[1].any()
    assert torch.equal(each, dropped & (torch.arange(dropped.shape[-1]) % 2 == 0))
    assert not found.pooled("blocks.1.attn1", phase, "heads").any()  # a layer that was never looked at
    assert 0 < found.share("heads") < found.share("all") == 1


def test_a_model_attends_to_tokens_where_it_should_and_else_by_its_plan():
    model, plan = tiny_wan(0), random_plan(density=0.5, seed=4)
    apply(model, plan, impl="cpu")
    found = Compensation(plan)
    with torch.no_grad():
        planned = model(**wan_inputs(batch=2, seed=1)).sample
        made = {}
        for choice in (None, "heads", "all"):
            with compensated(model, found, choice):
                made[choice] = model(**wan_inputs(batch=2, seed=1)).sample
    remove(model)
    for choice in (None, "heads"):  # nothing was looked at, so no head is known to be helped
        torch.testing.assert_close(made[choice], planned, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(made["all"], planned, atol=1e-2)


def test_every_idea_makes_a_plan_of_the_density_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "SENSITIVITY_SEEDS", 1)
    bench = Bench("cpu", 1, 2, "auto", MODEL, (3, 20, 28))
    plans = quality.Plans(bench, 2, (1, 1, 2), 16, tmp_path / "statistics")
    made = {name: plans(name, 0.5) for name in quality.IDEAS if not name.startswith(("refined", "pooled"))}
    for name, plan in made.items():
        assert plan.density == pytest.approx(0.5, abs=0.02), name
        assert plan.block == ((8, 8) if name == "blocks-32" else (16, 16))
    sparse, dense = plans._again(made["tiles"]), plans.statistics
    first, last = (f"blocks.{index}.attn1" for index in (0, 4))
    level = dense.noise_levels[0]  # the first step's first layer sees what it sees in the dense model
    assert sparse.noise_levels == dense.noise_levels and sparse.level_weights == dense.level_weights
    masses = [[each.mean(layer, "mass", [level]) for each in (sparse, dense)] for layer in (first, last)]
    same, other = ((one - two).abs().max() for one, two in masses)
    assert same < 1e-5 < 1e-4 < other
    monkeypatch.setattr(quality, "collect", None)  # the folder holds all that is needed
    again = quality.Plans(bench, 2, (1, 1, 2), 16, tmp_path / "statistics")
    assert again.statistics.level_weights == dense.level_weights
