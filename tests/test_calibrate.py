"""Calibration in two stages, what it measures of which call, and going on after an interruption."""

import copy
import errno
import io
import json
import multiprocessing
import os
import random
import re
import signal
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from PIL import Image
from several import on_ranks
from tiny_models import BLOCK, LATENTS, TinyPipeline, tiny_wan, wan_inputs

import calibration
from paroattn.capture import CaptureSettings, Statistics
from paroattn.demo.pipeline import load_demo
from paroattn.demo.prompt import CALIBRATION_PROMPTS
from paroattn.integration import collecting, sensitivity
from paroattn.integration.calibrate import calibrate, collect, load_statistics, progress_bar
from paroattn.integration.collecting import Economy, by_heads
from paroattn.integration.generate import Prompt
from paroattn.integration.journal import described, discard, unfinished
from paroattn.integration.projection import output_projection
from paroattn.kernels.block_stats import block_stats
from paroattn.plan.plan import Plan
from paroattn.plan.search import PlanSettings, make_plan

PROMPTS = ("a", "another")
STEPS = 4
CAPTURE = CaptureSettings(block=BLOCK, paper=False)
ECONOMY = Economy(order_steps=3, block_stride=3)
LAYERS = ("blocks.0.attn1", "blocks.1.attn1")
pytestmark = pytest.mark.usefixtures("one_thread")


class Pipeline(TinyPipeline):
    """Its clips depend on prompt and seed; guidance in two calls, in one of twice the batch, or not at all."""

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=4, generator=None, guidance="calls"):
        latents = torch.randn(1, *LATENTS, generator=generator)
        texts = [wan_inputs(seed=seed)["encoder_hidden_states"] for seed in (len(prompt), 2)]
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.scheduler.timesteps:
            model = self.transformer if self.transformer_2 is None or timestep >= 600 else self.transformer_2
            if guidance == "batch":
                with model.cache_context("cond_uncond"):
                    both = model(latents.repeat(2, 1, 1, 1, 1), timestep.expand(2), torch.cat(texts)).sample.chunk(2)
            else:
                names = ("cond", "uncond")[: 2 if guidance == "calls" else 1]
                both = [self._call(model, latents, timestep, *each, {}) for each in zip(texts, names, strict=False)]
            velocity = both[-1] + 2 * (both[0] - both[-1])
            latents = self.scheduler.step(velocity, timestep, latents).prev_sample
        return BaseOutput(frames=latents)


def pipeline(two=False):
    return Pipeline(tiny_wan(0), FlowMatchEulerDiscreteScheduler(shift=3.0), tiny_wan(1) if two else None)


@pytest.fixture(scope="module")
def pipe():
    return pipeline()


def collected(pipe, prompts=PROMPTS, exact=False, **settings):
    settings = {"steps": STEPS, "capture": CAPTURE, "economy": ECONOMY, "progress": lambda done: None} | settings
    return collect(pipe, list(prompts), exact=exact, **settings)


# What is measured


def units(statistics: Statistics) -> dict[str, list[tuple[str, ...]]]:
    return {layer: [statistics.units(layer, level) for level in levels] for layer, levels in statistics.layers.items()}


@pytest.mark.parametrize("guidance", ["calls", "batch"])
def test_prompts_and_branches_take_turns_from_layer_to_layer_and_step_to_step(pipe, guidance):
    found = collected(pipe, guidance=guidance)["transformer"]
    even, odd = ("0.0", "1.1"), ("0.1", "1.0")
    assert units(found) == {LAYERS[0]: [even, odd] * 2, LAYERS[1]: [odd, even] * 2}
    assert found.settings == replace(CAPTURE, codes=True)
    assert found.made["exact"] is False and found.made["economy"]["maps"] == 2


@pytest.mark.parametrize(
    ("prompts", "guidance", "maps", "counts"),
    [
        (PROMPTS, "calls", 1, {1}),
        (PROMPTS, "calls", 4, {4}),
        (PROMPTS, "none", 1, {1}),
        (("a",), "calls", 1, {1}),
        (("a",), "none", 1, {1}),
        (("a",), "calls", 2, {2}),
        (("a", "bc", "def", "g", "h"), "calls", 2, {2}),
    ],
)
def test_every_layer_and_step_is_measured_and_not_more_often_than_asked(pipe, prompts, guidance, maps, counts):
    economy = replace(ECONOMY, maps=maps)
    found = collected(pipe, prompts, economy=economy, guidance=guidance, steps=3)["transformer"]
    calls = {len(each) for layer in units(found).values() for each in layer}
    assert calls == counts
    assert len(found.noise_levels) == 3 and all(len(levels) == 3 for levels in found.layers.values())


def test_masks_come_from_all_query_blocks_in_the_order_that_was_chosen(pipe):
    exact, found = (collected(pipe, exact=exact)["transformer"] for exact in (True, False))
    generator, seen = torch.Generator(), 0
    for layer in LAYERS:
        index = torch.tensor([CAPTURE.orders.index(order) for order in found.chosen[layer]])
        ratio = found.mean(layer, "error")[0] / exact.mean(layer, "error")[index, torch.arange(2)]
        assert ratio.shape == (2, 7, 4)
        assert 0.5 < ratio.median() < 2  # from half as many maps
        seen += len({*found.chosen[layer]})
    assert seen and generator


def test_orders_are_those_that_a_sample_in_every_order_would_choose(pipe):
    found = collected(pipe, PROMPTS[:1])["transformer"]
    sample = collected(
        pipe, PROMPTS[:1], exact=None, steps=3, capture=replace(CAPTURE, block_stride=3)
    )["transformer"]  # fmt: skip
    assert sample.settings.block_stride == 3 and sample.made["exact"]
    chosen = {layer: orders for layer, orders in found.chosen.items()}
    assert list(chosen) == list(LAYERS)
    assert {order for orders in chosen.values() for order in orders} <= set(CAPTURE.orders)


def test_two_transformers_have_statistics_of_their_own():
    found = collected(pipeline(two=True), PROMPTS[:1])
    assert list(found) == ["transformer", "transformer_2"]
    levels = [each.noise_levels for each in found.values()]
    assert min(levels[0]) > max(levels[1]) and sum(map(len, levels)) == STEPS
    assert all(len(each.chosen) == 2 for each in found.values())


def test_what_would_take_too_much_is_measured_in_two_stages(pipe, monkeypatch, tmp_path):
    small = calibrate(pipe, "a", steps=3, capture=CAPTURE, economy=ECONOMY, statistics=tmp_path / "small")
    assert small["transformer"].made["calibration"]["exact"]
    monkeypatch.setattr(collecting, "EXACT_BYTES", 1000)
    large = calibrate(pipe, "a", steps=3, capture=CAPTURE, economy=ECONOMY, statistics=tmp_path / "large")
    assert not large["transformer"].made["calibration"]["exact"]
    sizes = [sum(path.stat().st_size for path in (tmp_path / name).rglob("*.saf*")) for name in ("small", "large")]
    assert sizes[1] < sizes[0]
    assert [load_statistics(tmp_path / name)["transformer"].settings.codes for name in ("small", "large")] == [
        False,
        True,
    ]


def test_masks_that_would_not_fit_are_refused_before_orders_are_measured(pipe, monkeypatch, tmp_path):
    layout = collected(pipe, PROMPTS[:1])["transformer"].layout
    settings = {"settings": replace(CAPTURE, codes=True), "chosen": {"a": ()}}
    size = Statistics("Model", 2, 64, layout, **settings).bytes_needed(2, STEPS)
    monkeypatch.setattr("paroattn.capture.statistics.LARGEST", size - 1)
    with pytest.raises(ValueError, match=r"2 layers, 4 noise levels, 1 orders and 7×4 blocks .* Take larger blocks"):
        collected(pipe, PROMPTS[:1], economy=replace(ECONOMY, order_steps=1, block_stride=7), journal=tmp_path / "new")
    assert json.loads((tmp_path / "new" / "calibration.json").read_text())["done"] == []


def test_progress_rises_to_one(pipe):
    for exact in (True, False):
        seen = []
        collected(pipe, exact=exact, progress=seen.append)
        assert seen == sorted(seen) and seen[-1] == 1.0 and len(set(seen)) > 10


def test_heads_measured_one_after_the_other_give_what_they_give_together(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    statistics = collected(pipeline(), PROMPTS[:1])["transformer"]
    q, k, v = (torch.randn(2, 210, 5, 64, generator=generator) for _ in range(3))
    w_o = torch.randn(5, 64, 20, generator=generator)
    settings = {"layout": statistics.layout, "orders": CAPTURE.orders, "block": BLOCK, "block_stride": 2}
    order = torch.tensor([0, 3, 1, 5, 2])
    for given in ({}, {"order": order}):
        whole = block_stats(q, k, v, w_o, **settings, **given)
        monkeypatch.setattr(collecting, "OPERAND_BYTES", 7 * 2 * 210 * 64 * 2)
        split = by_heads(block_stats, q, k, v, w_o, **settings, **given)
        for name in ("mass", "error", "sparse_share", "incoherence", "output_power", "rows"):
            torch.testing.assert_close(getattr(split, name), getattr(whole, name))
        assert split.calls == 2


@contextmanager
def offloaded(model):
    """The model with weights that are loaded when each of its modules runs."""
    cpu_offload(model, execution_device="cpu")
    yield model


def test_a_model_whose_weights_are_elsewhere_gives_the_same_statistics(pipe):
    here = collected(pipe, PROMPTS[:1])["transformer"]
    other = pipeline()
    with offloaded(other.transformer):
        assert other.transformer.blocks[0].attn1.to_out[0].weight.is_meta
        there = collected(other, PROMPTS[:1])["transformer"]
    for layer in LAYERS:
        assert torch.equal(here.mean(layer, "error"), there.mean(layer, "error"))
    gone = tiny_wan(0).to("meta")
    with pytest.raises(ValueError, match="this layer's are on no device"):
        output_projection(gone, LAYERS[0], gone.blocks[0].attn1)


# Interruptions


def plan_of(pipe, folder, exact, **changes) -> bytes:
    """The files of the plan, one after the other."""
    settings = {"steps": STEPS, "capture": CAPTURE, "economy": ECONOMY, "progress": lambda done: None} | changes
    plan = calibrate(pipe, list(PROMPTS), exact=exact, statistics=folder / "statistics", **settings)
    return saved(plan, folder)


def saved(plan: Plan, folder) -> bytes:
    plan.save_pretrained(folder / "plan")
    return b"".join(path.read_bytes() for path in sorted((folder / "plan").rglob("*")) if path.is_file())


def killed_after(folder, exact, writes: int) -> None:
    """Calibrate in a process that kills itself before or after its next so many renames."""
    random.seed(writes)
    torch.set_num_threads(1)
    torch.set_deterministic_debug_mode("warn")
    left, replaced = [writes], os.replace

    def counted(kind):
        def replace_or_die(source, target):
            left[0] -= 1
            if left[0] == 0 and kind:
                os.kill(os.getpid(), signal.SIGKILL)
            replaced(source, target)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        return replace_or_die

    os.replace = os.rename = counted(random.random() < 0.5)
    plan_of(pipeline(), folder, exact)
    os._exit(0)


def renames_of(folder, exact, monkeypatch) -> int:
    """How often a whole calibration renames."""
    count, replaced = [0], os.replace

    def counted(source, target):
        count[0] += 1
        replaced(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted)
        patch.setattr(os, "rename", counted)
        plan_of(pipeline(), folder, exact)
    return count[0]


@pytest.fixture(scope="module")
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "diffusers", "tiny_models", "test_calibrate"])
    return context


@pytest.mark.parametrize("exact", [True, False])
def test_a_killed_calibration_goes_on_and_gives_the_identical_plan(pipe, processes, tmp_path, exact):
    expected = plan_of(pipe, tmp_path / "whole", exact)
    assert not unfinished(tmp_path / "whole" / "statistics").exists()
    folder = tmp_path / "killed"
    for writes in (1, 6, 13):
        process = processes.Process(target=killed_after, args=(folder, exact, writes))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert unfinished(folder / "statistics").is_dir() and not (folder / "statistics").exists()
    assert plan_of(pipe, folder, exact) == expected
    assert sorted(path.name for path in folder.iterdir()) == ["plan", "statistics"]


def test_one_that_is_killed_while_it_writes_its_results_goes_on_too(pipe, processes, tmp_path, monkeypatch):
    total = renames_of(tmp_path / "whole", False, monkeypatch)
    expected = saved(Plan.from_pretrained(tmp_path / "whole" / "plan"), tmp_path / "again")
    for before_the_end in (0, 1, 2, 3):  # the plan, the journal that goes, the statistics, the last note
        folder = tmp_path / str(before_the_end)
        process = processes.Process(target=killed_after, args=(folder, False, total - before_the_end))
        process.start()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert plan_of(pipe, folder, False) == expected
        assert {path.name for path in folder.iterdir() if not path.name.startswith(".")} == {"plan", "statistics"}
        assert load_statistics(folder / "statistics")


def test_a_calibration_killed_at_any_time_goes_on_and_gives_the_identical_plan(pipe, processes, tmp_path):
    began = time.monotonic()
    expected = plan_of(pipe, tmp_path / "whole", False)
    seconds, drawn = time.monotonic() - began, random.Random(0)
    for _ in range(3):
        process = processes.Process(target=killed_after, args=(tmp_path / "killed", False, 10**9))
        process.start()
        time.sleep(seconds * (0.3 + drawn.random()))
        process.kill()
        process.join(60)
    assert plan_of(pipe, tmp_path / "killed", False) == expected


def test_finished_runs_are_not_run_again(pipe, tmp_path, monkeypatch):
    journal, ran = tmp_path / "journal", []
    run = collecting.Collector.finish
    monkeypatch.setattr(collecting.Collector, "finish", lambda self: (run(self), ran.append(self.run.name)))
    first = collected(pipe, journal=journal)["transformer"]
    assert ran == ["orders 0", "masks 0", "masks 1"]
    assert not (journal / "transformer" / "orders").exists()
    again = collected(pipe, journal=journal)["transformer"]
    assert len(ran) == 3 and again.made == first.made and again.chosen == first.chosen
    assert torch.equal(again.mean(LAYERS[1], "error"), first.mean(LAYERS[1], "error"))
    state = json.loads((journal / "calibration.json").read_text())
    (journal / "calibration.json").write_text(json.dumps(state | {"done": state["done"][:2]}))
    again = collected(pipe, journal=journal)["transformer"]
    assert ran[3:] == ["masks 1"]
    assert units(again) == units(first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": ("a", "b")}, "differs in prompts: .*'another'.*; got .*'b'"),
        ({"seed": 3}, "differs in seed: 0; got 3"),
        (
            {"capture": replace(CAPTURE, block=(32, 32))},
            r"differs in capture: \{'block': \[\d+, \d+\]\}; got \{'block': \[32, 32\]\}\.",
        ),
        ({"settings": PlanSettings(0.5)}, "differs in orders"),
        ({"prompts": (Prompt("a", guidance="batch"), "another")}, "differs in prompts"),
        ({"guidance": "none"}, "differs in call"),
    ],
)
def test_an_unfinished_calibration_of_something_else_is_not_gone_on_with(pipe, tmp_path, change, message):
    collected(pipe, journal=tmp_path / "journal", steps=2)
    with pytest.raises(ValueError, match=message):
        collected(pipe, **({"journal": tmp_path / "journal", "steps": 2} | change))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter").write_text("dear")
    with pytest.raises(FileExistsError, match="must be a new folder or an unfinished calibration"):
        collected(pipe, journal=tmp_path / "other")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")])
def test_when_memory_ends_what_was_measured_is_kept_and_the_message_says_so(pipe, tmp_path, monkeypatch, error):
    expected = plan_of(pipe, tmp_path / "whole", False)
    left = [7]

    def measure(*args, **settings):
        left[0] -= 1
        if left[0] == 0:
            raise error
        return block_stats(*args, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(collecting, "block_stats", measure)
        with pytest.raises(RuntimeError, match=r"more memory than there is .* kept in .*\.unfinished"):
            plan_of(pipe, tmp_path / "short", False)
    assert plan_of(pipe, tmp_path / "short", False) == expected


def test_a_disk_that_is_full_at_the_end_keeps_what_was_measured(pipe, tmp_path, monkeypatch):
    expected, folder = plan_of(pipe, tmp_path / "whole", False), tmp_path / "short"

    def full(*paths):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.hardlink_to", full)
        patch.setattr("shutil.copyfile", full)
        with pytest.raises(
            OSError, match=r"more space on the disk \(.*No space left.*kept in .*\.unfinished: run the same"
        ):
            plan_of(pipe, folder, False)
    assert [path.name for path in folder.iterdir()] == ["statistics.unfinished"]
    assert plan_of(pipe, folder, False) == expected


def test_when_the_disk_is_full_what_was_measured_is_kept(pipe, tmp_path, monkeypatch):
    expected, written = plan_of(pipe, tmp_path / "whole", False), []

    def full(descriptor):
        written.append(descriptor)
        if len(written) > 20:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match=r"cannot be written in .*\.unfinished.* \(No space left on device\)"):
            plan_of(pipe, tmp_path / "short", False)
    assert plan_of(pipe, tmp_path / "short", False) == expected


def test_what_a_pipeline_is_called_with_is_told_apart_by_its_content():
    one, two = torch.arange(6.0), torch.arange(6.0).bfloat16()
    picture = Image.new("RGB", (3, 2), (1, 2, 3))
    values = [
        one,
        one + 1,
        two,
        picture,
        Image.new("RGB", (3, 2)),
        [one, "x"],
        ["x"],
        Prompt("a", image=picture),
        "a",
        2,
    ]
    seen = [json.dumps(described(value)) for value in values]
    assert len(set(seen)) == len(values)
    assert [json.dumps(described(copy.deepcopy(value))) for value in values] == seen


def test_nothing_but_its_own_journal_is_removed(tmp_path):
    for name in ("plan.unfinished", "plan.finished", "plan"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "letter").write_text("dear")
    discard(unfinished(tmp_path / "plan"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan", "plan.finished"]
    assert (tmp_path / "plan.finished" / "letter").read_text() == "dear"


def test_a_damaged_journal_is_refused(pipe, tmp_path):
    collected(pipe, journal=tmp_path / "journal", steps=2)
    path = tmp_path / "journal" / "calibration.json"
    state = json.loads(path.read_text())
    for damaged, message in (
        ({"version": 99}, "another paroattn"),
        ({"done": 7}, "damaged"),
        ({"asked": []}, "damaged"),
    ):
        path.write_text(json.dumps(state | damaged))
        with pytest.raises(ValueError, match=message):
            collected(pipe, journal=tmp_path / "journal", steps=2)


def test_time_left_is_shown(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    out = io.StringIO()
    monkeypatch.setattr("sys.stderr", out)
    with progress_bar("calibrating") as report:
        for share in (0.1, 0.2, 0.3, 0.4):
            report(share)
            time.sleep(0.15)
    assert re.search(r"4\d?0?%.*0:00:0[0-9]", out.getvalue())


@pytest.mark.parametrize("bad", [{"maps": 0}, {"order_steps": 0}, {"block_stride": -1}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="must be 1 or more"):
        Economy(**bad)


# On the bundled model, and the benchmark


def test_8_bits_change_few_blocks_of_the_bundled_models_plan(tmp_path):
    settings = CaptureSettings(orders=("FHW", "WFH", "HWF"), paper=False, row_stride=16)
    exact = collect(
        load_demo(), CALIBRATION_PROMPTS[0], steps=1, capture=settings, progress=lambda done: None, guidance_scale=1.0
    )["transformer"]  # fmt: skip
    coded = replace(exact, settings=replace(settings, codes=True))
    coded.save(tmp_path / "statistics")
    coded = Statistics.load(tmp_path / "statistics")
    assert coded.settings.codes
    for density in (0.1, 0.25, 0.5):
        plans = [make_plan(each, PlanSettings(density, orders=settings.orders)) for each in (exact, coded)]
        changed = kept = 0
        for layer, mine in plans[0].layers.items():
            theirs = plans[1].layers[layer]
            assert theirs.orders == mine.orders
            changed += int((theirs.mask.dense() & ~mine.mask.dense()).sum())
            kept += int(mine.mask.dense().sum())
        assert 0 < changed < 0.01 * kept


def test_the_benchmark_measures_a_tiny_model_and_scales_it(tmp_path, monkeypatch):
    out = tmp_path / "calibration.json"
    words = ["calibration.py", "--model", "tiny", "--layers", 2, "--block", "32x64", "--steps", 2, "--order-steps", 1]
    words += ["--device", "cpu", "--scratch", tmp_path, "--out", out]
    monkeypatch.setattr("sys.argv", list(map(str, words)))
    calibration.main()
    (row,) = json.loads(out.read_text())["rows"]
    assert row.items() >= {
        "model": "tiny", "tokens": 210, "layers": 3, "layers_measured": 2, "heads": 2, "phases": 2, "prompts": 2,
        "extra_gib": None,
    }.items()  # fmt: skip
    assert row["seconds"] > 0 and row["seconds_forward"] > 0
    assert {path.name for path in tmp_path.iterdir()} == {"calibration.json"}


def together(rank, folder):
    """Calibrate everything, and with economy; in folders of its own and in none."""
    ways = ((True, None), (False, None), (False, folder / "statistics"))
    return [whole_calibration(exact, statistics) for exact, statistics in ways]


def whole_calibration(exact, statistics=None):
    """What the plan is, and how many maps were measured and samples made for sensitivity."""
    counted = Counter()

    def counting(module, name):
        function = getattr(module, name)

        def call(*args, **kwargs):
            counted[name] += 1
            return function(*args, **kwargs)

        return patch.object(module, name, call)

    with counting(collecting, "block_stats"), counting(sensitivity, "run"):
        plan = calibrate(
            pipeline(two=True), list(PROMPTS), exact=exact, steps=STEPS, capture=CAPTURE, economy=ECONOMY,
            statistics=statistics, settings=PlanSettings(density=0.4, precision="fp32"),
            progress=lambda done: None,
        )  # fmt: skip
    return {name: [part.digest(), dict(part.made)] for name, part in plan.items()}, counted


def test_three_processes_make_the_plan_that_one_makes(tmp_path):
    alone = [whole_calibration(exact) for exact in (True, False)]
    alone.append(alone[1])
    assert alone[0][0] != alone[1][0]
    everywhere = on_ranks(3, together, tmp_path)
    assert all(isinstance(made, list) for made in everywhere), everywhere
    for (plan, whole), *shares in zip(alone, *everywhere, strict=True):
        assert [made for made, _ in shares] == [plan] * 3
        assert sum((share for _, share in shares), Counter()) == whole
        assert max(share["run"] for _, share in shares) < whole["run"] / 2
    assert [path.name for path in tmp_path.iterdir()] == ["statistics"]
    kept = load_statistics(tmp_path / "statistics")
    assert {name: sorted(each.layers) for name, each in kept.items()} == dict.fromkeys(alone[0][0], sorted(LAYERS))
