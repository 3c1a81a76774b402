import itertools
from dataclasses import replace

import pytest
import torch

import balance
import scaling
from architectures import ARCHITECTURES
from paroattn.block_mask import BlockMask
from paroattn.grid import Grid
from paroattn.plan.balance import contiguous_deal, deal_heads, imbalance, kept_blocks
from synthetic_plan import synthetic_plan


def spread(heads, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(heads, generator=generator) ** 2 * 1e6).long().tolist()


@pytest.mark.parametrize("heads, ranks", [(40, 1), (40, 2), (40, 4), (40, 8), (6, 3), (48, 16), (5, 5)])
def test_every_head_is_dealt_once_and_every_rank_gets_as_many(heads, ranks):
    dealt = deal_heads(spread(heads), ranks)
    assert sorted(itertools.chain(*dealt)) == list(range(heads))
    assert [len(each) for each in dealt] == [heads // ranks] * ranks
    assert all(list(each) == sorted(each) for each in dealt)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_heads_of_a_real_model_balance_within_five_percent(ranks):
    found = [imbalance(spread(40, seed), deal_heads(spread(40, seed), ranks)) for seed in range(20)]
    before = [imbalance(spread(40, seed), contiguous_deal(40, ranks)) for seed in range(20)]
    assert max(found) < 1.05 < sum(before) / len(before)


@pytest.mark.parametrize("seed", range(6))
def test_two_ranks_come_near_the_best_deal_there_is(seed):
    costs = spread(10, seed)
    halves = itertools.combinations(range(10), 5)
    best = min(max(part, sum(costs) - part) for part in (sum(costs[h] for h in half) for half in halves))
    assert imbalance(costs, deal_heads(costs, 2)) <= 1.03 * best * 2 / sum(costs)


def test_swaps_mend_what_dealing_from_the_dearest_leaves():
    costs = [11, 10, 5, 4, 3, 1]  # dealt 11 4 3 and 10 5 1; 11 5 1 and 10 4 3 are even
    assert imbalance(costs, deal_heads(costs, 2)) == 1.0


def test_equal_heads_are_dealt_by_their_number():
    assert deal_heads([1.0] * 6, 3) == deal_heads([1.0] * 6, 3) == ((0, 3), (1, 4), (2, 5))


def test_the_deal_without_a_plan_is_that_of_ulysses():
    assert contiguous_deal(6, 3) == ((0, 1), (2, 3), (4, 5))
    assert imbalance([1, 1, 1, 1, 4, 4], contiguous_deal(6, 3)) == 2.0


def test_a_head_costs_its_kept_blocks_in_every_phase():
    kept = torch.rand(3, 4, 5, 11, generator=torch.Generator().manual_seed(0)) < 0.4
    kept[..., 2] = True
    assert kept_blocks(BlockMask.from_dense(kept, (64, 128))).equal(kept.sum((-2, -1)))


@pytest.mark.parametrize("ranks", [0, 4, 7, 12])
def test_ranks_that_do_not_divide_the_heads_are_refused(ranks):
    with pytest.raises(ValueError, match=rf"must divide the 6 heads; got {ranks}. Use one of 1, 2, 3, 6"):
        deal_heads([1] * 6, ranks)


def test_kept_blocks_are_counted_without_masks():
    model = replace(ARCHITECTURES["wan-14b-720p"], grid=Grid(5, 12, 20))
    names = tuple(map(str, range(sum(model.depth))))
    made = synthetic_plan(
        model.transformer, names[:3], model.heads, model.head_dim, model.grid, model.text, density=0.3, block=(128, 128)
    )
    counted = balance.synthetic_costs(model, 0.3)
    assert len(counted) == len(names)
    assert counted[:3] == [kept_blocks(layer.mask).tolist() for layer in made.layers.values()]


def test_a_deal_for_every_phase_is_weighed_by_its_share():
    costs = [[[4, 3, 1, 2], [4, 1, 3, 2]]]  # even: heads 0 and 2 against 1 and 3; heads 0 and 1 against 2 and 3
    found = balance.row("some", 0.5, [0.75, 0.25], costs, 2)
    assert found["in_order"] == pytest.approx(0.75 * 1.4 + 0.25)
    assert found["by_layer"] == pytest.approx(0.75 + 0.25 * 1.4)
    assert (found["by_phase"], found["worst"]) == (1.0, 1.0)


ONE = {
    "depth": 2, "ms": 220.0, "batch": 1, "tokens": 1000, "heads": 4,
    "layer": {"attention": 40.0, "linear": 50.0, "idle": 10.0},
}  # fmt: skip
TWO = ONE | {"exchange_bf16_ms": 3.0}


def test_the_model_divides_work_and_adds_the_exchange():
    whole = 1000 * 4 * 128 * 2
    moved = 4 * whole / 4 / (3 * whole / 4 / 3.0)  # of q, k, v and the output, as long as three took, and a third more
    copied = 2 * 4 * whole / 2 / scaling.MEMORY * 1e3
    ms = scaling.modelled_ms(ONE, TWO, 2, 1.5)
    assert ms == pytest.approx(2 * ((44 * 1.5 + 55) / 2 + 11 + moved + copied))


def test_beyond_one_host_the_network_carries_what_leaves_it():
    inside, beyond = (scaling.exchange_ms(ONE, TWO, gpus, 128) for gpus in (8, 16))
    sent = 4 * 1000 * 4 * 128 * 2 / 16
    assert beyond > sent / 2 / scaling.NETWORK * 1e3
    assert inside < scaling.exchange_ms(ONE, TWO, 2, 128)
