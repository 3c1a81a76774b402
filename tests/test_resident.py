"""Masks of large plans: packed until they are used, and one phase at a time where kernels read them."""

import copy
import hashlib
import json

import pytest
import torch

from paroattn.block_mask import BlockMask
from paroattn.grid import Grid, TextSpan
from paroattn.kernels import attention as public
from paroattn.kernels.attention import attention, attention_by_group
from paroattn.kernels.planned import operands_of
from paroattn.kernels.resident import ResidentGroups, ResidentMask
from paroattn.phases import Phase
from paroattn.plan import folder, packing
from paroattn.plan.packing import PackedMask, pack, unpack_all
from paroattn.plan.plan import LayerPlan, Plan, PlanError, TransformerPlan

GRID, BLOCK, HEADS = Grid(3, 5, 7), (16, 32), 2
PHASES = (Phase(0.6, 0.25), Phase(0.3, 0.25), Phase(0.0, 0.5))
SHAPE = (3, HEADS, 7, 4)
CPU = torch.device("cpu")


def _mask(seed: int = 0) -> BlockMask:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(SHAPE, generator=generator) < 0.4
    kept[..., 0] |= ~kept.any(-1)
    return BlockMask.from_dense(kept, BLOCK)


def _packed(mask: BlockMask) -> PackedMask:
    return PackedMask("a", pack({"a": mask.bits})["a"], SHAPE, BLOCK)


def _plan() -> TransformerPlan:
    layers = {name: LayerPlan(("FHW", "WHF"), _mask(seed), (("fp32",) * HEADS,) * 3) for seed, name in enumerate("ab")}
    return TransformerPlan("Model", HEADS, 16, GRID, TextSpan(), BLOCK, PHASES, layers)


# Packed


def test_a_packed_mask_is_the_mask_and_is_unpacked_once():
    mask = _mask()
    packed = _packed(mask)
    assert packed.shape == mask.shape == SHAPE and (packed.heads, packed.query_blocks) == (HEADS, 7)
    assert not packed.unpacked
    assert torch.equal(packed.bits, mask.bits) and packed.bits is packed.bits and packed.unpacked
    assert packed._packed is None
    assert torch.equal(packed.head_density(), mask.head_density())
    assert torch.equal(packed[1].dense(), mask[1].dense())


def test_what_is_still_packed_is_unpacked_together_and_the_rest_left_alone(monkeypatch):
    masks = [_packed(_mask(0)), _mask(1), _packed(_mask(2))]
    _ = masks[0].bits
    done = []
    real = packing.unpack
    monkeypatch.setattr(packing, "unpack", lambda packed, shape: done.append(shape) or real(packed, shape))
    unpack_all(masks)
    assert len(done) == 1 and torch.equal(masks[2].bits, _mask(2).bits)
    unpack_all(masks)
    assert len(done) == 1


def test_a_copy_of_a_packed_mask_unpacks_by_itself():
    packed = _packed(_mask())
    again = copy.deepcopy(packed)
    assert torch.equal(again.bits, _mask().bits) and not packed.unpacked


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (lambda bits: bits[:2], r"a: packed masks must hold 42 bytes; got other\. Fetch"),
        (lambda bits: torch.zeros_like(bits), "a: every row must keep at least one block"),
        (lambda bits: bits | 0xF0, "a: bits beyond the 4 key blocks must be 0"),
    ],
    ids=["short", "empty rows", "stray bits"],
)
def test_what_is_no_mask_is_found_when_it_is_unpacked(bits, message):
    packed = PackedMask("a", pack({"a": bits(_mask().bits)})["a"], SHAPE, BLOCK)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            _ = packed.bits


def test_a_large_plan_is_loaded_without_unpacking_and_its_sum_is_checked_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "PACKED_FROM", 0)
    where = Plan({"transformer": _plan()}).save_pretrained(tmp_path / "plan")
    again = Plan.from_pretrained(where)["transformer"]
    for name, layer in again.layers.items():
        assert isinstance(layer.mask, PackedMask) and not layer.mask.unpacked
        assert layer.orders == ("FHW", "WHF")
        assert torch.equal(layer.mask.bits, _plan().layers[name].mask.bits)
    path = where / "transformer" / "plan.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(PlanError, match="SHA-256"):
        Plan.from_pretrained(where)
    described = json.loads((where / "transformer" / "plan.json").read_text())
    assert described["tensors"]["sha256"] != hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_packed_plan_is_saved_again_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(folder, "PACKED_FROM", 0)
    first = Plan({"transformer": _plan()}).save_pretrained(tmp_path / "one")
    second = Plan.from_pretrained(first).save_pretrained(tmp_path / "two")
    blobs = [(each / "transformer" / "plan.safetensors").read_bytes() for each in (first, second)]
    assert blobs[0] == blobs[1]


# Resident


@pytest.mark.parametrize("text", [0, 9, 40])
def test_every_phase_is_in_the_same_memory_and_is_the_plan_s(text):
    mask, plain = _mask(), _mask()
    resident = ResidentMask(mask, (GRID.tokens, text), CPU, launch_order=True, overwrite=True)
    places = set()
    for phase in (0, 2, 1, 0, 0):
        found = resident.follow(phase)
        expected = plain[phase].with_text(GRID.tokens, text)
        assert torch.equal(found.bits, expected.bits) and torch.equal(found.launch_order, expected.launch_order)
        assert found is resident.follow(phase)
        places.add((found.bits.data_ptr(), found.launch_order.data_ptr()))
    assert len(places) == 1
    assert torch.equal(mask.bits, plain.bits)  # the plan itself is as it was


def test_another_phase_is_another_object_so_that_nothing_kept_for_the_one_before_is_taken_for_it():
    resident = ResidentMask(_mask(), (GRID.tokens, 0), CPU, launch_order=False, overwrite=True)
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, GRID.tokens, HEADS, 16, generator=generator) for _ in range(3))
    for phase in (0, 1, 2, 0):
        mixed = {"precision": ("fp32", "int8"), "impl": "reference"}  # heads apart, whose masks are kept
        found = attention(q, k, v, resident.follow(phase), **mixed)
        assert torch.equal(found, attention(q, k, v, _mask()[phase], **mixed))


def test_groups_of_heads_stay_in_the_same_memory_and_follow_the_phase():
    mask, order = _mask(), torch.arange(HEADS, dtype=torch.int32)
    by_phase = [["int8", "fp32"], ["int4", "fp32"], ["int8", "fp32"]]
    groups = ResidentGroups(by_phase, mask, order, (GRID.tokens, 9), launch_order=True)
    places = set()
    for phase in (0, 2, 1, 0):
        found, whole = groups.follow(phase), mask[phase].with_text(GRID.tokens, 9)
        assert [group.precision for group in found] == ["fp32", by_phase[phase][0]]
        for group, head in zip(found, (1, 0), strict=True):
            assert (group.heads.tolist(), group.order.tolist()) == ([head], [head])
            part = BlockMask(whole.bits[[head]], whole.key_blocks, whole.block)
            assert torch.equal(group.mask.bits, part.bits)
            assert torch.equal(group.mask.launch_order, part.launch_order)
        places.add(tuple(group.mask.bits.data_ptr() for group in found))
    assert len(places) == 1


def test_a_captured_call_looks_into_the_mask_s_memory_for_some_heads(monkeypatch):
    resident = ResidentMask(_mask(), (GRID.tokens, 0), CPU, launch_order=False, overwrite=True)
    first = resident.follow(0)
    kept, index = public._some_heads(first, [1])
    resident.follow(1)
    assert public._some_heads(first, [1])[0] is kept and not torch.equal(kept.bits, first.bits[[1]])
    monkeypatch.setattr(public, "_capturing", lambda bits: True)
    now, same = public._some_heads(first, [1])
    assert torch.equal(now.bits, _mask()[1].bits[[1]]) and same is index


def test_on_a_cpu_the_plan_s_own_memory_is_read():
    mask = _mask()
    resident = ResidentMask(mask, (GRID.tokens, 0), CPU, launch_order=False)
    assert resident.follow(1).bits.data_ptr() == mask.bits[1].data_ptr()
    first = resident.follow(0)
    resident.follow(2)
    assert torch.equal(first.bits, mask.bits[0])


def test_another_host_gets_the_phase_it_asks_for():
    plan = _plan()
    for phase in (0, 1, 2, 1):
        operands = operands_of(plan, "b", phase)
        assert torch.equal(operands["mask"].bits, plan.layers["b"].mask.bits[phase])
        assert operands["mask"] is operands_of(plan, "b", phase)["mask"]


def _large() -> tuple[BlockMask, list[torch.Tensor]]:
    """Masks of three phases, and q, k and v, for a GPU."""
    kept = torch.rand(3, HEADS, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    kept |= torch.eye(8, dtype=torch.bool)
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (1, 512, HEADS, 64)
    qkv = [torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    return BlockMask.from_dense(kept, (64, 64)), qkv


def _follows(phases, call, expected) -> None:
    """A captured call gives what is expected of every phase that `phases` follows, which waits for nothing."""
    phases(0)
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for phase in (1, 2, 0):
        torch.cuda.set_sync_debug_mode("error")
        try:
            phases(phase)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph.replay()
        torch.testing.assert_close(found, expected[phase], atol=0, rtol=0)


@pytest.mark.gpu
def test_on_a_gpu_a_captured_call_follows_the_phase_and_nothing_waits():
    mask, qkv = _large()
    resident = ResidentMask(mask, (512, 0), torch.device("cuda"), launch_order=True)
    expected = [attention(*qkv, BlockMask(mask.bits[phase].cuda(), 8, (64, 64))) for phase in range(3)]
    _follows(resident.follow, lambda: attention(*qkv, resident.follow(0)), expected)


@pytest.mark.gpu
def test_on_a_gpu_a_mask_that_is_there_already_is_followed_like_one_of_the_host():
    mask, _ = _large()
    there = BlockMask(mask.bits.cuda(), mask.key_blocks, mask.block)
    ours, other = (ResidentMask(each, (512, 0), torch.device("cuda"), launch_order=True) for each in (there, mask))
    for phase in (0, 2, 1):
        assert torch.equal(ours.follow(phase).bits, other.follow(phase).bits)
    assert torch.equal(there.bits.cpu(), mask.bits)  # following wrote over its own memory, not over the plan's


@pytest.mark.gpu
def test_on_a_gpu_a_captured_call_of_two_precisions_follows_the_phase():
    mask, qkv = _large()
    names, order = ("int8", "int4"), torch.zeros(HEADS, dtype=torch.int32, device="cuda")
    table = torch.arange(512, dtype=torch.int32, device="cuda")[None]
    resident = ResidentGroups([names] * 3, mask, order, (512, 0), launch_order=True)
    groups = resident.follow(0)  # as captured: their memory is that of every later phase
    expected = []
    for phase in range(3):
        parts = [
            attention(*(x[:, :, [head]] for x in qkv), BlockMask(mask.bits[phase, [head]].cuda(), 8, (64, 64)),
                      precision=name) for head, name in enumerate(names)
        ]  # fmt: skip
        expected.append(torch.cat(parts, 2))
    _follows(resident.follow, lambda: attention_by_group(*qkv, groups, table=table), expected)
    whole = ResidentMask(mask, (512, 0), torch.device("cuda"), launch_order=True)
    _follows(whole.follow, lambda: attention(*qkv, whole.follow(0), precision=names), expected)
