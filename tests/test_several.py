"""Several processes and one sequence. Each launch checks many things, since a launch takes seconds."""

import contextlib
import io
import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ContextParallelConfig
from PIL import Image
from several import on_ranks
from tiny_models import BLOCKS, GRID, HEAD_DIM, TWO_PHASES, VARIANTS, Variant, random_plan, tiny_wan, wan_inputs

import multi_gpu
from paroattn import apply, dense, remove, report
from paroattn.block_mask import BlockMask
from paroattn.cli import main
from paroattn.demo.prompt import EVALUATION_PROMPTS
from paroattn.grid import Grid, Layout, TextSpan
from paroattn.integration import ranks
from paroattn.integration.apply import set_noise_level
from paroattn.integration.operands import Followed
from paroattn.integration.ranks import Ranks
from paroattn.integration.splits import split_sequence
from paroattn.kernels.dealing import collect, deal
from paroattn.plan.plan import PlanError

HEADS = 6
SPLIT = (
    "wan", "wan-i2v", "wan-ti2v", "cogvideox-2b", "cogvideox-5b", "cogvideox-1.5", "hunyuanvideo", "ltx", "ltx-2",
    "ltx-2.3", "flux", "flux.2", "qwen-image", "qwen-image-padded",
)  # fmt: skip
RAGGED = ("wan", "cogvideox-5b", "hunyuanvideo", "flux", "qwen-image-padded")
UNEVEN = {"phases": TWO_PHASES, "heads": HEADS, "density": 0.4}

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning"),
]


def wide(name: str, heads: int = HEADS) -> Variant:
    """A variant with heads enough to share; the widths of ltx-2.3 hang together."""
    variant, width = VARIANTS[name], heads * HEAD_DIM
    if name == "ltx-2.3":
        return variant
    own = {"num_attention_heads": heads, "cross_attention_dim": width, "added_kv_proj_dim": width}
    return replace(variant, config={key: own.get(key, value) for key, value in variant.config.items()})


def forward(model: Any, variant: Variant) -> torch.Tensor:
    inputs = variant.call(2 if variant.text.tokens else 1)
    mask = inputs.get("encoder_hidden_states_mask")
    inputs |= {} if mask is None else {"encoder_hidden_states_mask": mask.flip(1)}  # padding ahead of the real text
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def whole_and_split(name: str, heads: int) -> dict[str, float]:
    """How far a split model is from a whole one, by its plan and dense, and how far those two are from one another."""
    variant = wide(name, heads)
    plan = variant.plan(heads=variant.config["num_attention_heads"], density=0.4)
    model = variant.build()
    apply(model, plan)
    sparse = forward(model, variant)
    with dense(model):
        full = forward(model, variant)
    split_sequence(model)
    found = {"sparse": distance(forward(model, variant), sparse)}
    with dense(model):
        found["dense"] = distance(forward(model, variant), full)
    return found | {
        "between": distance(sparse, full),
        "density": float(str(report(model).to_dict()["transformer"]["density"])),
    }


def models(rank: int, names: tuple[str, ...], heads: int, parts: int) -> dict[str, Any]:
    ranks.PARTS, found = parts, {}
    for name in names:
        try:
            found[name] = whole_and_split(name, heads)
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    return found


@pytest.fixture(scope="module")
def two_ranks() -> list[Any]:
    return on_ranks(2, models, SPLIT, HEADS, 1)


@pytest.fixture(scope="module")
def four_ranks() -> list[Any]:
    return on_ranks(4, models, RAGGED, 8, 2)


def check_equal(everywhere: list[Any], name: str) -> None:
    for found in (each[name] for each in everywhere):
        assert "error" not in found, found["error"]
        assert max(found["sparse"], found["dense"]) < 3e-6
        assert found["between"] > 1e-3 and 0.3 < found["density"] < 0.9


@pytest.mark.parametrize("name", SPLIT)
def test_two_processes_compute_what_one_does(two_ranks, name):
    check_equal(two_ranks, name)


@pytest.mark.parametrize("name", RAGGED)
def test_four_processes_with_unequal_parts_compute_what_one_does(four_ranks, name):
    check_equal(four_ranks, name)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("rank", [0, 1])
def test_masks_orders_and_precision_are_those_of_the_heads_of_a_rank_in_every_phase(parts, rank, monkeypatch):
    monkeypatch.setattr(ranks, "PARTS", parts)
    plan = random_plan(phases=TWO_PHASES, heads=8, seed=3)
    layer = replace(plan.layers["blocks.0.attn1"], precision=(("fp32", "int8") * 4, ("int8",) * 3 + ("fp32",) * 5))
    two, order = Ranks(None, rank, 2, "", True), torch.arange(8, dtype=torch.int32)
    table, layout = torch.zeros(8, plan.grid.tokens, dtype=torch.int32), Layout(plan.grid)
    followed = Followed(layer, order, table, layout, torch.device("cpu"), two, launch_order=False, mixed=True)
    for phase in (0, 1, 0):
        found = followed.follow(phase, layer.precision[phase])
        assert followed.follow(phase, layer.precision[phase]) is found
        assert len(found.parts) == (0 if parts == 1 else parts)
        dealt = two.deal(layer.mask[phase])
        for part, heads in zip((found, *found.parts), (torch.cat(dealt, 1), *dealt), strict=False):
            assert part.heads is not None and part.heads.equal(heads)
            assert part.order.equal(order[heads[rank]])
            assert part.mask.dense().equal(layer.mask[phase].dense()[heads[rank]])
            assert part.precision == tuple(layer.precision[phase][head] for head in heads[rank])
    assert not two.deal(layer.mask[0])[0].equal(two.deal(layer.mask[1])[0])


def uneven_plan() -> Any:
    """Another precision for every second head, another density for every head."""
    plan = random_plan(**UNEVEN)
    generator = torch.Generator().manual_seed(1)
    layers = {}
    for name, layer in plan.layers.items():
        kept = layer.mask.dense()
        kept &= torch.rand(kept.shape, generator=generator) < torch.linspace(0.2, 1.0, HEADS)[:, None, None]
        kept[..., 0] = True
        names = (("fp32", "int8") * 3, ("int8",) * HEADS)
        layers[name] = replace(layer, mask=BlockMask.from_dense(kept, plan.block), precision=names)
    return replace(plan, layers=layers)


def by_phase(model: Any) -> torch.Tensor:
    outputs = []
    for level in (0.8, 0.3):
        set_noise_level(model, level)
        with torch.no_grad():
            outputs.append(model(**wan_inputs(2), return_dict=False)[0])
    set_noise_level(model, None)
    return torch.stack(outputs)


def orders_and_phases(rank: int) -> dict[str, Any]:
    """Split before and after apply, by diffusers' own call and ours; a plan of phases, uneven heads and precisions."""
    plan, found = uneven_plan(), {}
    model = tiny_wan(heads=HEADS)
    apply(model, plan, impl="reference")
    expected = by_phase(model)
    remove(model)
    with torch.no_grad():
        stock = model(**wan_inputs(), return_dict=False)[0]
    for before in (True, False):
        model = tiny_wan(heads=HEADS)
        if before:
            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        apply(model, plan, impl="reference")
        if not before:
            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        found[f"before {before}"] = distance(by_phase(model), expected)
        layer = model.blocks[0].attn1.processor._paro_layer
        found[f"heads {before}"] = layer.operands.heads.tolist()
        remove(model)
        with torch.no_grad():
            found[f"stock {before}"] = distance(model(**wan_inputs(), return_dict=False)[0], stock)
    model = tiny_wan(heads=HEADS, layers=1)
    apply(model, random_plan(BLOCKS[:1], heads=HEADS))
    split_sequence(model)
    with torch.no_grad():
        eager = model(**wan_inputs(), return_dict=False)[0]
        model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
        found["compiled"] = distance(model(**wan_inputs(), return_dict=False)[0], eager)
    return found


def test_a_model_is_split_before_or_after_apply():
    mine, theirs = on_ranks(2, orders_and_phases)
    assert mine["heads True"] == mine["heads False"] == theirs["heads True"] != [[0, 1, 2], [3, 4, 5]]
    for found in (mine, theirs):
        for name, value in found.items():
            assert name.startswith("heads") or value < 3e-6, (name, value)


def refused(work: Any, *args: Any, **kwargs: Any) -> str:
    try:
        work(*args, **kwargs)
    except (PlanError, ValueError) as error:
        return str(error)
    return "nothing was refused"


def misuses(rank: int) -> dict[str, str]:
    """Everything that is refused, with what it says; all of it leaves the group usable."""
    config = ContextParallelConfig(ulysses_degree=2)

    def run(model: Any, **inputs: Any) -> None:
        with torch.no_grad():
            model(**(inputs or wan_inputs()), return_dict=False)

    found = {}
    split = tiny_wan(heads=3)
    split.enable_parallelism(config=config)
    found["heads"] = refused(apply, split, random_plan(heads=3))
    found["recording"] = refused(lambda: _record(split))
    split = tiny_wan(heads=3)
    apply(split, random_plan(heads=3))
    split.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    found["heads later"] = refused(run, split)

    other = tiny_wan(heads=HEADS)
    apply(other, random_plan(heads=HEADS, seed=rank))
    split_sequence(other)
    found["plans"] = refused(run, other)
    found["twice"] = refused(split_sequence, other)
    other = tiny_wan(heads=HEADS)
    apply(other, random_plan(heads=HEADS), precision="int8" if rank else None)
    split_sequence(other)
    found["settings"] = refused(run, other)
    found["model"] = refused(apply, wide("flux").build(), random_plan(heads=HEADS))

    odd = random_plan(heads=HEADS, grid=Grid(5, 7, 5))
    model = tiny_wan(heads=HEADS)
    apply(model, odd)
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    found["tokens"] = refused(run, model, **wan_inputs(latents=(4, 5, 14, 10)))

    cog = wide("cogvideox-5b")
    model = cog.build()
    found["no plan"] = refused(split_sequence, model)
    apply(model, cog.plan(heads=HEADS))
    split_sequence(model)
    found["remove"] = refused(remove, model)
    found["unknown"] = refused(split_sequence, wide("sd3").build())
    found["replaced"] = refused(split_sequence, _planned("hunyuanvideo-i2v"))

    ring = tiny_wan(heads=HEADS)
    ring.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    found["ring"] = refused(apply, ring, random_plan(heads=HEADS))
    found["three"] = refused(split_sequence, tiny_wan(heads=HEADS), 3)
    alone = tiny_wan(heads=HEADS)
    split_sequence(alone, 1)
    found["alone"] = str(alone._parallel_config)
    return found


def _planned(name: str) -> Any:
    variant = wide(name)
    model = variant.build()
    apply(model, variant.plan(heads=HEADS))
    return model


def _record(model: Any) -> None:
    from paroattn.integration.apply import recording

    with recording(model, lambda *_: None):
        pass


SAYS = {
    "heads": "must divide the 3 heads; got 2",
    "heads later": "must divide the 3 heads; got 2",
    "recording": "recorded of whole models",
    "plans": "rank 1 follows another one than rank 0",
    "settings": "rank 1 follows another one than rank 0",
    "model": "made for WanTransformer3DModel; this model is FluxTransformer2DModel",
    "twice": "split already",
    "tokens": "must divide the 175 video tokens. ContextParallelConfig(ulysses_degree=2, ulysses_anything=True)",
    "no plan": "must have a plan before it is split",
    "remove": "needs whole sequences",
    "unknown": "diffusers must know how to split a SD3Transformer2DModel",
    "replaced": "counts them in the whole sequence",
    "ring": "this one has ring parallelism",
    "three": "must divide the 2 processes; got 3",
    "alone": "None",
}


@pytest.fixture(scope="module")
def said() -> list[Any]:
    return on_ranks(2, misuses)


@pytest.mark.parametrize("what", SAYS)
def test_misuse_is_refused_on_every_rank(said, what):
    for found in said:
        assert isinstance(found, dict), found
        assert SAYS[what] in found[what]


def dying(rank: int) -> float:
    model = tiny_wan(heads=HEADS)
    apply(model, random_plan(heads=HEADS))
    split_sequence(model)
    with torch.no_grad():
        model(**wan_inputs(), return_dict=False)
        if rank:
            model.blocks[1].attn1.register_forward_pre_hook(lambda *_: os._exit(1))
        model(**wan_inputs(), return_dict=False)
    return 0.0


def test_a_rank_that_dies_in_a_step_ends_the_others():
    mine, theirs = on_ranks(2, dying, limit=40)
    assert theirs is None
    assert mine[0] == "RuntimeError" and "onnection" in mine[1]


def thirds(rank: int) -> float:
    model, inputs = tiny_wan(heads=HEADS), wan_inputs(2, latents=(4, 5, 14, 10))
    apply(model, random_plan(heads=HEADS, grid=Grid(5, 7, 5)))
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
        split_sequence(model)
        return distance(model(**inputs, return_dict=False)[0], expected)


def test_three_processes_share_175_tokens():
    assert max(on_ranks(3, thirds)) < 3e-6


def groups(rank: int) -> float:
    model = tiny_wan(heads=HEADS)
    apply(model, random_plan(heads=HEADS))
    inputs = wan_inputs(seed=rank // 2)
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
        split_sequence(model, 2)
        return distance(model(**inputs, return_dict=False)[0], expected)


def test_groups_of_ranks_work_on_clips_of_their_own():
    assert max(on_ranks(4, groups)) < 3e-6


def test_without_processes_nothing_is_split():
    with pytest.raises(ValueError, match="Start with torchrun"):
        split_sequence(tiny_wan())


@pytest.mark.parametrize("side", ["prefix", "suffix"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_tokens_arrive_as_diffusers_splits_them(side, size):
    layout = Layout(GRID, TextSpan(23, side))
    video, text = torch.arange(23, 233), torch.arange(23)
    if side == "suffix":
        video, text = torch.arange(210), torch.arange(210, 233)
    streams = (text, video) if side == "prefix" else (video, text)
    pieces = [torch.cat(parts) for parts in zip(*(each.tensor_split(size) for each in streams), strict=True)]
    shared = Ranks(None, size - 1, size, "", True)
    assert shared.arrived(layout).equal(torch.cat(pieces))
    assert shared.sizes(layout) == tuple(map(len, pieces))
    assert shared.own_tokens(layout) == len(pieces[-1])
    assert shared.own_video(layout) == len(video.tensor_split(size)[-1])
    assert torch.cat(pieces)[shared.places(layout)].equal(torch.arange(233))


def test_plans_that_differ_in_anything_have_other_digests():
    plan = uneven_plan()
    name, layer = next(iter(plan.layers.items()))
    bits = layer.mask.bits.clone()
    bits[0, 2, 1, 0] |= 15
    changed = [
        replace(plan, layers={**plan.layers, name: replace(layer, mask=replace(layer.mask, bits=bits))}),
        replace(plan, layers={**plan.layers, name: replace(layer, orders=layer.orders[::-1])}),
        replace(plan, layers={**plan.layers, name: replace(layer, precision=layer.precision[::-1])}),
        replace(plan, layers=dict(reversed(plan.layers.items()))),
    ]
    assert len({each.digest() for each in (plan, *changed)} | {plan.digest("int8")}) == 6
    assert plan.digest(1) == uneven_plan().digest(1)


@pytest.mark.parametrize("batch", [1, 3])
def test_dealt_heads_are_collected_again(batch):
    x = torch.arange(batch * 5 * 6 * 7).view(batch, 5, 6, 7)
    heads = torch.tensor([[4, 0], [1, 5], [3, 2]])
    dealt = deal(x, heads)
    assert dealt.shape == (3, 5, batch, 2, 7)
    for rank, place in ((0, 0), (1, 1), (2, 0)):
        assert dealt[rank, :, :, place].equal(x[:, :, heads[rank, place]].transpose(0, 1))
    assert collect(dealt, heads, torch.empty_like(x)).equal(x)


@pytest.mark.parametrize("batch, channels", [(1, 64), (3, 40)])
def test_the_copying_kernel_does_the_same(batch, channels):
    from paroattn.kernels.copying import copy

    device = "cuda" if torch.cuda.is_available() else "cpu"
    whole = torch.randn(6, batch, 21, channels, device=device)
    x, heads = whole.permute(1, 2, 0, 3), torch.tensor([[4, 0], [1, 5], [3, 2]], device=device)
    dealt = torch.empty(3, 21, batch, 2, channels, device=device)
    copy(x, dealt, heads, back=False)
    assert dealt.cpu().equal(deal(x.cpu(), heads.cpu()))
    again = torch.empty_like(x, memory_format=torch.contiguous_format)
    copy(again, dealt, heads, back=True)
    assert again.equal(x)


def benchmark(rank: int, port: int, out: Path) -> int:
    started(rank, 2, port)
    words = "--tiny --gpus 1 2 --precision int8 --block 32x32 --rounds 1 --depths 1 2 --overlap --out"
    with contextlib.redirect_stdout(io.StringIO()):
        return multi_gpu.main([*words.split(), str(out)])


def test_the_benchmark_compares_what_several_compute_with_one(tmp_path):
    out = tmp_path / "rows.json"
    assert on_ranks(2, benchmark, free_port(), out, backend=None) == [0, 0]
    rows = json.loads(out.read_text())["rows"]
    assert [(row["gpus"], row["balanced"]) for row in rows] == [(1, True), (2, True), (2, False)]
    assert all(row["same_attention"] and row["error_vs_1"] < 1e-5 and row["extrapolated"] for row in rows)
    assert [row["imbalance"] for row in rows[:1]] == [1.0] and rows[1]["imbalance"] < rows[2]["imbalance"]
    for row in rows:
        (low, less), (high, more) = ((each["depth"], each["ms"]) for each in row["measured"])
        assert (low, high) == (1, 2) and row["ms"] == pytest.approx(less + (more - less) * 2, rel=2e-3)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def started(rank: int, processes: int, port: int) -> None:
    """Leave the environment as torchrun makes it."""
    words = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in words.items()}


WORDS = ("generate", "demo", "--prompt", EVALUATION_PROMPTS[0], "--steps", "1", "--json", "--guidance-scale", "1")


def commands(rank: int, port: int, folder: Path) -> list[Any]:
    """`paro generate` as torchrun starts it, once as it should be and once with a plan that is not there."""
    started(rank, 3, port)
    found = []
    for more in ([], ["--plan", str(folder / "nowhere")]):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main([*WORDS, "--out", str(folder / f"{rank}.png"), *more])
        found.append((status, out.getvalue(), err.getvalue()))
    return found


def test_paro_generate_under_torchrun_writes_one_clip_and_speaks_once(tmp_path, capsys):
    first, *others = on_ranks(3, commands, free_port(), tmp_path, backend=None)
    assert isinstance(first, list), first
    status, numbers, words = first[0]
    assert (status, json.loads(numbers)["processes"]) == (0, 3)
    assert f"wrote {tmp_path / '0.png'}" in words
    assert [other[0] for other in others] == [(0, "", "")] * 2
    for rank, found in enumerate((first, *others)):
        status, numbers, words = found[1]
        assert (status, numbers) == (2, "")
        assert words.startswith(f"paro generate (rank {rank}): " if rank else "paro generate: ")
    assert [path.name for path in tmp_path.iterdir()] == ["0.png"]
    assert main([*WORDS, "--out", str(tmp_path / "alone.png")]) == 0
    shown, alone = (np.asarray(Image.open(tmp_path / f"{name}.png"), dtype=float) for name in ("0", "alone"))
    off = np.abs(shown - alone)  # in float32, on another number of threads
    assert shown.std() > 10 and off.max() <= 3 and off.mean() < 0.05


def on_gpus(rank: int) -> dict[str, float]:
    """Split and whole on the kernels, in bf16 with INT8 products: video alone in unequal parts, and text before it."""
    found = {}
    for name in ("wan", "flux"):
        variant = wide(name)
        model = variant.build().to("cuda", torch.bfloat16)
        inputs = {
            key: x.to("cuda", torch.bfloat16 if x.is_floating_point() else None) for key, x in variant.call(2).items()
        }
        inputs |= {"hidden_states": inputs["hidden_states"][..., :10]} if name == "wan" else {}
        grid = Grid(5, 7, 5) if name == "wan" else variant.grid
        plan = variant.plan(heads=HEADS, density=0.4, block=(64, 64), grid=grid)
        apply(model, plan, precision="int8")
        with torch.no_grad():
            expected = model(**inputs, return_dict=False)[0].float()
            with dense(model):
                full = model(**inputs, return_dict=False)[0].float()
            split_sequence(model)
            found[name] = distance(model(**inputs, return_dict=False)[0].float(), expected)
        found[f"{name} between"] = distance(full, expected)
    return found


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_compute_what_one_does():
    for found in on_ranks(2, on_gpus, backend="nccl"):
        assert isinstance(found, dict), found
        assert all(found[name] < min(0.02, found[f"{name} between"] / 2) for name in ("wan", "flux")), found
