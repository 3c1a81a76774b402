"""Every model of the table, as a tiny random transformer: what is computed, what is refused, what calibration sees."""

import functools
import itertools
import warnings
from contextlib import contextmanager, nullcontext
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models import attention_processor
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor
from tiny_models import (
    BLOCK,
    HEAD_DIM,
    HEADS,
    IMAGE,
    TEXT,
    TWO_PHASES,
    VARIANTS,
    WIDTH,
    TinyPipeline,
    VariantPipeline,
    positions,
    tiny_wan,
)
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from paroattn.block_mask import blocks_of
from paroattn.capture import CaptureSettings, Statistics
from paroattn.grid import Grid, Layout, TextSpan
from paroattn.integration import backend, models
from paroattn.integration.adapters import ADAPTERS, dispatching
from paroattn.integration.apply import apply, dense, recording, remove, report, set_noise_level
from paroattn.integration.calibrate import calibrate, collect
from paroattn.integration.hook import hook_of
from paroattn.integration.models import MODELS, GridUnknown, self_attentions
from paroattn.integration.projection import output_projection
from paroattn.kernels.block_stats import block_stats
from paroattn.plan.plan import PlanError
from paroattn.plan.search import PlanSettings, make_plan

EVERY = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
real_sdpa = F.scaled_dot_product_attention
pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning"),  # Mochi's rotary embedding
    pytest.mark.usefixtures("one_thread"),
]


@functools.cache
def built(name):
    """A model that tests share; each leaves it as it was."""
    return VARIANTS[name].build()


def of(variant):
    return built(next(name for name, each in VARIANTS.items() if each is variant))


def forward(model, inputs):
    """Everything a model returns, video and sound."""
    with torch.no_grad():
        found = model(**inputs)
    parts = [found.sample, getattr(found, "audio_sample", None)]
    return torch.cat([part.flatten() for part in parts if part is not None])


def difference(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


@contextmanager
def applied(model, plan, **settings):
    apply(model, plan, **settings)
    try:
        yield
    finally:
        remove(model)


@functools.cache
def token_mask(layer, phase, grid, text, side):
    """Who reads whom, (H, N, N) in the model's order, by sorting the tokens of the grid in each head's order."""
    tokens, (rows, columns) = grid.tokens + text, layer.mask.block
    packed = np.unpackbits(layer.mask.bits[phase].numpy(), axis=-1, bitorder="little")
    kept = np.ones((len(layer.orders), blocks_of(tokens, rows), blocks_of(tokens, columns)), dtype=bool)
    sparse = (grid.tokens // rows, grid.tokens // columns) if text else kept.shape[1:]
    kept[:, : sparse[0], : sparse[1]] = packed[:, : sparse[0], : sparse[1]]
    coordinates = [dict(zip("FHW", each, strict=True)) for each in itertools.product(*map(range, grid))]
    masks = []
    for order, keep in zip(layer.orders, kept, strict=True):
        visited = sorted(range(grid.tokens), key=lambda token: [coordinates[token][axis] for axis in order])
        video = np.argsort(visited)
        behind = np.arange(grid.tokens, tokens)
        place = np.concatenate([behind, video] if side == "prefix" else [video, behind])
        masks.append(keep[place // rows][:, place // columns])
    return torch.from_numpy(np.stack(masks))


@contextmanager
def masked(model, variant, plan, monkeypatch, phase=0):
    """Run the stock model's self-attentions under dense masks over single tokens."""
    running, seen = [], []

    def attend(query, key, value, attn_mask=None, **rest):
        text = key.shape[-2] - plan.grid.tokens
        if not running or query.shape != key.shape or text < 0:
            return real_sdpa(query, key, value, attn_mask=attn_mask, **rest)
        seen.append(running[-1])
        allowed = token_mask(plan.layers[running[-1]], phase, plan.grid, text, variant.text.side)
        return real_sdpa(query, key, value, attn_mask=allowed if attn_mask is None else allowed & attn_mask, **rest)

    handles = []
    for name in plan.layers:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        handles.append(module.register_forward_hook(lambda *_: running.pop() and None))
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attend)
        yield
    for handle in handles:
        handle.remove()
    assert set(seen) == set(plan.layers)


class TestEveryVariant:
    @EVERY
    @pytest.mark.parametrize("batch", [1, 2])
    def test_a_plan_that_keeps_all_blocks_equals_the_stock_model_in_any_order(self, variant, batch):
        model, inputs = of(variant), variant.call(batch)
        expected = forward(model, inputs)
        with applied(model, variant.plan(density=1)):
            assert difference(forward(model, inputs), expected) < 1e-5
            found = report(model).to_dict()["transformer"]
        assert found["calls"] == {"sparse": 1} and found["grids_seen"] == {str(variant.grid): 1}
        assert {name: row["sparse_calls"] for name, row in found["layers"].items()} == dict.fromkeys(variant.layers, 1)

    @EVERY
    def test_a_sparse_plan_equals_dense_masks_over_tokens(self, variant, monkeypatch):
        model, inputs, plan = of(variant), variant.call(2), variant.plan(density=0.4, phases=TWO_PHASES)
        stock = forward(model, inputs)
        for phase, level in enumerate((0.9, 0.1)):
            with masked(model, variant, plan, monkeypatch, phase):
                expected = forward(model, inputs)
            with applied(model, plan):
                set_noise_level(model, level)
                found = forward(model, inputs)
            assert difference(found, expected) < 1e-5
            assert difference(found, stock) > 1e-3

    @EVERY
    def test_remove_restores_every_bit_and_no_key_is_added(self, variant):
        model, inputs = of(variant), variant.call()
        before = {name: getattr(module, "processor", None) for name, module in model.named_modules()}
        keys, expected = list(model.state_dict()), forward(model, inputs)
        with applied(model, variant.plan(density=0.4)):
            assert list(model.state_dict()) == keys
            assert not torch.equal(forward(model, inputs), expected)
            with dense(model):
                assert difference(forward(model, inputs), expected) < 1e-5
        assert all(model.get_submodule(name).processor is each for name, each in before.items() if each is not None)
        assert torch.equal(forward(model, inputs), expected) and list(model.state_dict()) == keys

    @EVERY
    def test_only_self_attention_over_video_is_touched(self, variant):
        model = of(variant)
        assert set(self_attentions(model)) == set(variant.layers)
        names = [name for name, module in model.named_modules() if hasattr(module, "processor")]
        before = {name: model.get_submodule(name).processor for name in names}
        with applied(model, variant.plan()):
            changed = {name for name in names if model.get_submodule(name).processor is not before[name]}
        assert changed == set(variant.layers)

    @EVERY
    def test_another_grid_raises_before_the_first_block_or_runs_dense(self, variant):
        model, inputs = of(variant), variant.call()
        frames, height, width = variant.grid
        other = Grid(frames, width, height)
        expected, ran = forward(model, inputs), []
        watch = [module.register_forward_pre_hook(lambda *_: ran.append(1)) for module in model.children()]
        says = rf"for grid {other} .*; this call has {variant.grid}\. Calibrate at this resolution, or .*strict=False"
        with applied(model, variant.plan(grid=other)), pytest.raises(PlanError, match=says):
            forward(model, inputs)
        assert ran == []
        for handle in watch:
            handle.remove()
        with applied(model, variant.plan(grid=other), strict=False):
            with pytest.warns(UserWarning, match="Such calls run dense") as caught:
                for _ in range(2):
                    assert difference(forward(model, inputs), expected) < 1e-5
            found = report(model).to_dict()["transformer"]
        assert len([each for each in caught if "dense" in str(each.message)]) == 1
        assert [sum(row["dense_calls"].values()) for row in found["layers"].values()] == [2] * len(variant.layers)
        assert found["density"] == 1 and found["grids_seen"] == {str(variant.grid): 2}

    @EVERY
    def test_calibrate_plan_and_apply_work(self, variant, tmp_path):
        pipe: Any = VariantPipeline(variant.build(), variant.scheduler())
        plan = calibrate(
            pipe, "a cat", steps=2, density=0.5, progress=lambda share: None, statistics=tmp_path / "statistics",
            settings=PlanSettings(orders=("FHW", "WHF"), phase_ends=(0.5, 1.0)), calls=calls_of(variant),
            capture=CaptureSettings(orders=("FHW", "WHF"), block=BLOCK, paper=False),
        )  # fmt: skip
        part = plan["transformer"]
        assert (part.model_class, part.grid, part.text.side) == (variant.transformer, variant.grid, variant.text.side)
        assert set(part.layers) == set(variant.layers) and part.density == pytest.approx(0.5, abs=0.05)
        apply(pipe, plan)
        pipe("a dog", torch.Generator(), calls=calls_of(variant))
        found = report(pipe).to_dict()["transformer"]
        assert found["calls"] == {"sparse": 4}
        for row in found["layers"].values():
            assert [phase["sparse_calls"] for phase in row["phases"]] == [2, 2]


def calls_of(variant, **changed):
    return lambda branch, seed: variant.call(1, seed) | changed


def test_the_table_has_no_row_without_a_variant_here():
    assert {variant.transformer for variant in VARIANTS.values()} == set(MODELS)


def refuses(variant, inputs, has, expected=None):
    """A call has no grid: an error with both sides, or a dense run that the report counts."""
    model = of(variant)
    expected = forward(model, inputs)
    with applied(model, variant.plan()):
        with pytest.raises(PlanError, match=rf"for grid {variant.grid} .*; this call has {has}.*strict=False"):
            forward(model, inputs)
    with applied(model, variant.plan(), strict=False):
        with pytest.warns(UserWarning, match=f"{has}.*run dense"):
            assert difference(forward(model, inputs), expected) < 1e-5
        found = report(model).to_dict()["transformer"]
    assert sum(found["calls"].values()) == 1 and "sparse" not in found["calls"] and len(found["grids_seen"]) == 1
    with pytest.raises(PlanError, match=rf"must tell the grid; this call has {has}"), recording(model, print):
        forward(model, inputs)


class TestReferenceImages:
    @pytest.mark.parametrize("name", ["flux", "flux.2"])
    def test_an_image_of_another_size_beside_the_image_has_no_grid(self, name):
        variant, inputs = VARIANTS[name], VARIANTS[name].call()
        reference = positions(1, 10, 9, *((1,) if name == "flux.2" else ()))
        reference[:, 0] = 1 if name == "flux" else 10
        places = inputs["img_ids"][0] if name == "flux.2" else inputs["img_ids"]
        inputs |= {
            "img_ids": torch.cat([places, reference]),
            "hidden_states": torch.randn(1, IMAGE.tokens + 90, 4),
        }
        refuses(variant, inputs, "300 tokens that are no single grid: reference images")

    def test_an_image_of_the_same_size_counts_as_another_frame(self):
        variant, inputs = VARIANTS["flux"], VARIANTS["flux"].call()
        both = Grid(2, 14, 15)
        inputs |= {"img_ids": positions(*both), "hidden_states": torch.randn(1, both.tokens, 4)}
        model = of(variant)
        with applied(model, variant.plan()), pytest.raises(PlanError, match=r"for grid 1x14x15.*this call has 2x14x15"):
            forward(model, inputs)
        expected = forward(model, inputs)
        with applied(model, variant.plan(grid=both, density=1)):
            assert difference(forward(model, inputs), expected) < 1e-5

    @pytest.mark.parametrize("wrong", ["shuffled", "shorter", "layered", "interleaved", "negative"])
    def test_places_that_are_no_raster_have_no_grid(self, wrong):
        variant, inputs = VARIANTS["flux.2"], VARIANTS["flux.2"].call()
        places = inputs["img_ids"][0].clone()
        if wrong == "shuffled":
            places = places.flip(0)
        elif wrong == "shorter":
            places = places[:-1]
        elif wrong == "layered":
            places[100:, 3] = 1
        elif wrong == "interleaved":
            places = positions(1, 7, 15, 2)
        else:
            places -= 1
        with pytest.raises(GridUnknown, match="210 tokens that are no single grid"):
            models.index_grid(of(variant), inputs | {"img_ids": places})

    def test_places_for_another_number_of_tokens_have_no_grid(self):
        inputs = VARIANTS["flux"].call() | {"img_ids": positions(1, 7, 15)}
        with pytest.raises(GridUnknown, match="210 tokens, 105 of them in a grid 1x7x15"):
            models.index_grid(None, inputs)

    def test_places_are_read_once_for_all_steps(self, monkeypatch):
        variant, reads = VARIANTS["flux"], []
        read = models._read_grid
        monkeypatch.setattr(models, "_read_grid", lambda places: reads.append(1) or read(places))
        model, inputs = of(variant), variant.call()
        with applied(model, variant.plan()):
            for step in range(3):
                forward(model, variant.call(seed=step) | {"img_ids": inputs["img_ids"]})
            assert len(reads) == 1
            forward(model, inputs | {"img_ids": inputs["img_ids"].clone()})
        assert len(reads) == 2

    def test_images_of_bfloat16_places_are_understood(self):
        variant, inputs = VARIANTS["flux"], VARIANTS["flux"].call()
        assert models.index_grid(of(variant), inputs | {"img_ids": inputs["img_ids"].bfloat16()}) == IMAGE

    @pytest.mark.parametrize("mode", ["extract", "cached"])
    def test_cached_keys_of_reference_images_are_refused(self, mode):
        variant = VARIANTS["flux.2"]
        model, inputs = variant.build(), variant.call()
        for name, attn in self_attentions(model).items():
            single = name.startswith("single")
            attn.set_processor(Flux2KVParallelSelfAttnProcessor() if single else Flux2KVAttnProcessor())
        expected = forward(model, inputs)
        apply(model, variant.plan(density=1))
        assert difference(forward(model, inputs), expected) < 1e-5
        with pytest.raises(PlanError, match="this call has reference images as cached keys and values"):
            forward(model, inputs | {"kv_cache_mode": mode, "num_ref_tokens": 15})

    @pytest.mark.parametrize(
        ("shapes", "has"),
        [
            ([[(1, 14, 15), (1, 10, 9)]], "images of 1x14x15 and 1x10x9"),
            ([[(1, 14, 15), (1, 14, 15)]], "images of 1x14x15 and 1x14x15"),
            ([], "no img_shapes"),
        ],
    )
    def test_several_images_in_one_sequence_have_no_grid(self, shapes, has):
        model, inputs = of(VARIANTS["qwen-image"]), VARIANTS["qwen-image"].call() | {"img_shapes": shapes}
        with applied(model, VARIANTS["qwen-image"].plan()), pytest.raises(PlanError, match=f"this call has {has}"):
            forward(model, inputs)

    def test_shapes_are_understood_with_and_without_a_list_for_each_element(self):
        inputs = VARIANTS["qwen-image"].call(2)
        for shapes in ([(1, 14, 15)] * 2, [[(1, 14, 15)]] * 2, [[[1, 14, 15]]]):
            assert models.shape_grid(None, inputs | {"img_shapes": shapes}) == IMAGE
        with pytest.raises(GridUnknown, match="images of"):
            models.shape_grid(None, inputs | {"img_shapes": [[(1, 14, 15)], [(1, 15, 14)]]})
        with pytest.raises(GridUnknown, match="210 tokens, 196 of them in a grid 1x14x14"):
            models.shape_grid(None, inputs | {"img_shapes": [[(1, 14, 14)]]})

    def test_frames_that_are_appended_to_a_video_have_no_grid(self):
        variant = VARIANTS["ltx"]
        inputs = variant.call() | {"hidden_states": torch.randn(1, 252, 4), "video_coords": torch.rand(1, 3, 252)}
        refuses(variant, inputs, "252 tokens, 210 of them in a grid 5x7x6: reference images or frames")

    def test_coordinates_alone_tell_no_grid(self):
        inputs = VARIANTS["ltx"].call() | {"video_coords": torch.rand(1, 3, 210), "num_frames": None}
        refuses(VARIANTS["ltx"], inputs, "no num_frames, height and width")

    def test_a_mask_over_the_video_is_refused_before_the_first_block(self):
        inputs = VARIANTS["ltx-2"].call() | {"video_self_attention_mask": torch.rand(1, 210, 210).round()}
        if diffusers.__version__ < "0.39":
            pytest.skip("diffusers 0.38 has no such mask")
        refuses(VARIANTS["ltx-2"], inputs, "a mask over its video tokens")


class TestPaddedText:
    def scattered(self, batch=2):
        mask = torch.rand(batch, TEXT, generator=torch.Generator().manual_seed(3)) < 0.6
        assert not torch.equal(mask, mask.sort(1, descending=True).values)
        return mask

    @pytest.mark.parametrize("name", ["qwen-image-padded", "mochi"])
    @pytest.mark.parametrize("density", [1, 0.4])
    def test_padding_may_stand_anywhere(self, name, density, monkeypatch):
        variant, model = VARIANTS[name], of(VARIANTS[name])
        plan = variant.plan(density=density)
        key = "encoder_attention_mask" if name == "mochi" else "encoder_hidden_states_mask"
        inputs = variant.call(2) | {key: self.scattered()}
        with masked(model, variant, plan, monkeypatch):
            expected = forward(model, inputs)
        with applied(model, plan):
            assert difference(forward(model, inputs), expected) < 1e-5

    @pytest.mark.parametrize("side", ["prefix", "suffix"])
    def test_real_text_is_moved_to_the_front_on_either_side(self, side):
        layout = Layout(Grid(1, 2, 3), TextSpan(4, side))
        real = torch.tensor([[False, True, False, True], [True, True, True, False]])
        video = torch.ones(2, 6, dtype=torch.bool)
        mask = torch.cat([real, video] if side == "prefix" else [video, real], 1)
        tokens = torch.arange(20.0).view(2, 10, 1, 1).expand(2, 10, 2, 3)
        (found,) = backend._real_text_first(layout, mask[:, None, None], layout.text_positions, tokens)
        text = [1, 3, 0, 2, 10, 11, 12, 13] if side == "prefix" else [7, 9, 6, 8, 16, 17, 18, 19]
        rest = [*range(4, 10), *range(14, 20)] if side == "prefix" else [*range(6), *range(10, 16)]
        ahead = 0 if side == "prefix" else 6
        assert found[:, ahead : ahead + 4, 1, 2].flatten().tolist() == text
        kept = torch.cat([found[:, :ahead], found[:, ahead + 4 :]], 1)[..., 0, 0]
        assert kept.flatten().tolist() == rest

    def test_a_prompt_of_one_real_token_is_no_special_case(self):
        variant, model = VARIANTS["mochi"], of(VARIANTS["mochi"])
        inputs = variant.call(2)
        inputs["encoder_attention_mask"][0] = False
        inputs["encoder_attention_mask"][0, 0] = True
        expected = forward(model, inputs)
        with applied(model, variant.plan(density=1)):
            assert difference(forward(model, inputs), expected) < 1e-5

    @pytest.mark.parametrize("name", ["hunyuanvideo", "hunyuanvideo-1.5-i2v", "mochi", "qwen-image-padded"])
    def test_what_an_observer_sees_has_no_padding(self, name):
        variant, model, seen = VARIANTS[name], of(VARIANTS[name]), []
        both = variant.call(2)
        with recording(model, lambda *args: seen.append(args)):
            forward(model, both)
        lengths = [k.shape[1] for _, _, q, k, *_ in seen]
        real = [variant.grid.tokens + tokens for tokens in self.real_of(name)]
        assert lengths == real * len(variant.layers)
        for _, _, q, k, v, _, _, grid, text, _ in seen:
            assert q.shape == k.shape == v.shape == (1, Layout(grid, text).tokens, HEADS, HEAD_DIM)
            assert (grid, text.side) == (variant.grid, variant.text.side)

    def real_of(self, name):
        # 13 and 21 of 21 tokens, and beside them 7 of 7 and an image of 5
        return [13 + 7 + 5, 21 + 7 + 5] if name == "hunyuanvideo-1.5-i2v" else [13, 21]

    def test_an_observer_sees_the_tokens_that_stock_attention_sees(self, monkeypatch):
        variant, model, stock, seen = VARIANTS["mochi"], of(VARIANTS["mochi"]), [], []

        def watched(query, key, value, **rest):
            if key.shape[-2] > 210:
                stock.append([x.transpose(1, 2) for x in (query, key, value)])
            return real_sdpa(query, key, value, **rest)

        inputs = variant.call(2) | {"encoder_attention_mask": self.scattered()}
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", watched)
            forward(model, inputs)
        with recording(model, lambda *args: seen.append(args[2:5])):
            forward(model, inputs)
        assert len(seen) == len(stock) == 4
        for found, expected in zip(seen, stock, strict=True):
            for a, b in zip(found, expected, strict=True):
                assert torch.allclose(a, b, atol=1e-5)

    def test_calibration_is_the_same_however_long_the_padding(self):
        variant = VARIANTS["hunyuanvideo"]
        model = of(variant)
        found = []
        for padding in (0, 30):
            pipe = VariantPipeline(model, FlowMatchEulerDiscreteScheduler())

            def call(branch, seed, padding=padding):
                inputs = variant.call(1, seed)
                return inputs | {
                    "encoder_hidden_states": F.pad(
                        inputs["encoder_hidden_states"][:, :13], (0, 0, 0, padding), value=7.0
                    ),
                    "encoder_attention_mask": F.pad(inputs["encoder_attention_mask"][:, :13], (0, padding)),
                }

            settings = CaptureSettings(orders=("FHW",), block=BLOCK, paper=False)
            found.append(
                collect(pipe, "a cat", steps=1, capture=settings, progress=lambda share: None, calls=call)[
                    "transformer"
                ]
            )
        for layer in variant.layers:
            for statistic in ("mass", "error", "output_power"):
                a, b = (each.mean(layer, statistic) for each in found)
                assert difference(a, b) < 1e-4

    def test_prompts_of_different_lengths_calibrate_together(self):
        variant = VARIANTS["qwen-image"]
        pipe = VariantPipeline(variant.build(), FlowMatchEulerDiscreteScheduler())

        def call(branch, seed):
            inputs = variant.call(1, seed)
            return inputs | {
                "encoder_hidden_states": inputs["encoder_hidden_states"][:, : 9 if branch == "cond" else 17]
            }

        settings = CaptureSettings(orders=("FHW",), block=BLOCK, paper=False)
        found = collect(pipe, "a cat", steps=2, capture=settings, progress=lambda share: None, calls=call)[
            "transformer"
        ]
        assert [sums.calls for sums in found.layers[variant.layers[0]].values()] == [2, 2]
        assert make_plan(found, PlanSettings(orders=("FHW",), phase_ends=(1.0,))).text.side == "prefix"

    def test_two_sizes_in_one_calibration_are_refused(self):
        variant = VARIANTS["wan"]
        pipe = VariantPipeline(variant.build(), FlowMatchEulerDiscreteScheduler())

        def call(branch, seed):
            inputs = variant.call(1, seed)
            turned = inputs["hidden_states"].transpose(3, 4)
            return inputs | ({"hidden_states": turned} if branch == "uncond" else {})

        with pytest.raises(ValueError, match="must have one grid; got 5x7x6 and 5x6x7"):
            collect(pipe, "a cat", steps=1, capture=CaptureSettings(orders=("FHW",), block=BLOCK), calls=call)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else [found]:
            if isinstance(each, torch.Tensor) and each.dtype == torch.bool:
                self.elements = max(self.elements, each.numel())
        return found


class TestHunyuanVideo15:
    def test_the_mask_over_all_pairs_of_tokens_is_never_built(self):
        variant, model = VARIANTS["hunyuanvideo-1.5"], of(VARIANTS["hunyuanvideo-1.5"])
        inputs, tokens = variant.call(1), variant.grid.tokens + variant.text.tokens
        with Largest() as stock:
            forward(model, inputs)
        assert stock.elements == tokens**2
        with applied(model, variant.plan()):
            forward(model, inputs)  # the plan's own masks over blocks are made once
            with Largest() as sparse:
                forward(model, inputs)
            with dense(model), Largest() as without_plan:
                forward(model, inputs)
        with applied(model, variant.plan(grid=Grid(5, 6, 7)), strict=False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Largest() as mismatched:
                forward(model, inputs)
        with recording(model, lambda *_: None), Largest() as recorded:
            forward(model, inputs)
        for each in (sparse, without_plan, mismatched, recorded):
            assert each.elements <= 8 * tokens


class TestSeveralLengths:
    def test_layers_that_see_no_text_have_a_layout_of_their_own(self):
        variant, model = VARIANTS["sd3.5"], of(VARIANTS["sd3.5"])
        with applied(model, variant.plan(density=0.4)):
            forward(model, variant.call())
            hook: Any = hook_of(model)
            tokens = {name: layer.operands.table.shape[1] for name, layer in hook.layers.items()}
            found = report(model).to_dict()["transformer"]["layers"]
        assert {name for name, count in tokens.items() if count == IMAGE.tokens} == set(variant.video_only)
        for name, row in found.items():
            video = float(variant.plan(density=0.4).layers[name].mask.density)
            assert row["density"] == pytest.approx(video) if name in variant.video_only else row["density"] > video

    def test_prompts_of_any_length_run_under_one_plan(self):
        variant, model = VARIANTS["qwen-image"], of(VARIANTS["qwen-image"])
        inputs = variant.call()
        with applied(model, variant.plan(density=1)):
            found = []
            for tokens in (1, 5, 21, 5, 13, 17, 1):
                text = {"encoder_hidden_states": inputs["encoder_hidden_states"][:, :tokens]}
                found.append((text, forward(model, inputs | text)))
        for text, each in found:
            assert difference(each, forward(model, inputs | text)) < 1e-5


class TestProcessors:
    @pytest.mark.parametrize("name", ["cogvideox-5b", "sd3", "sd3.5", "mochi", "hunyuanvideo-1.5"])
    def test_each_one_computes_what_the_original_does_also_by_itself(self, name):
        variant, inputs = VARIANTS[name], VARIANTS[name].call(2)
        model = variant.build()
        expected = forward(model, inputs)
        for attn in self_attentions(model).values():
            attn.processor = dispatching(attn.processor)
            assert type(attn.processor) in ADAPTERS.values()
        assert difference(forward(model, inputs), expected) < 1e-6

    @pytest.mark.parametrize("name", ["flux", "qwen-image"])
    def test_diffusers_skips_a_planned_layer_as_it_skips_the_original(self, name):
        model = VARIANTS[name].build()
        registry = AttentionProcessorRegistry
        expected = [registry.get(type(attn.processor)) for attn in self_attentions(model).values()]
        apply(model, VARIANTS[name].plan())
        assert [registry.get(type(attn.processor)) for attn in self_attentions(model).values()] == expected

    def test_a_layer_that_skips_the_dispatcher_runs_dense_as_without_a_plan(self, monkeypatch):
        variant, model, used = VARIANTS["mochi"], of(VARIANTS["mochi"]), []
        dispatch = backend.dispatch_attention_fn

        def watched(*args, backend, **rest):
            used.append(backend)
            return dispatch(*args, backend=AttentionBackendName.NATIVE, **rest)

        monkeypatch.setattr(backend, "dispatch_attention_fn", watched)
        with applied(model, variant.plan()), dense(model), attention_backend("_native_math"):
            forward(model, variant.call())
        assert used == [AttentionBackendName.NATIVE] * 2

    def test_others_are_left_alone(self):
        other = AttnProcessor2_0()
        assert dispatching(other) is other

    def test_one_that_nobody_knows_is_refused(self):
        model = VARIANTS["sd3"].build()
        model.transformer_blocks[1].attn.set_processor(attention_processor.PAGJointAttnProcessor2_0())
        before = {name: attn.processor for name, attn in self_attentions(model).items()}
        with pytest.raises(ValueError, match=r"transformer_blocks\.1\.attn: .* got PAGJointAttnProcessor2_0"):
            apply(model, VARIANTS["sd3"].plan())
        assert {name: attn.processor for name, attn in self_attentions(model).items()} == before

    @pytest.mark.parametrize("name", ["cogvideox-5b", "sd3"])
    def test_fused_projections_before_apply_are_followed(self, name, monkeypatch):
        variant, inputs, plan = VARIANTS[name], VARIANTS[name].call(2), VARIANTS[name].plan(density=0.4)
        model = variant.build()
        model.fuse_qkv_projections()
        for attn in self_attentions(model).values():
            attn.to_q.weight.zero_()  # from now on only the fused one counts
        fused = dict(model.attn_processors)
        stock = forward(model, inputs)
        with masked(model, variant, plan, monkeypatch):
            expected = forward(model, inputs)
        with applied(model, plan):
            assert difference(forward(model, inputs), expected) < 1e-5
        assert all(model.attn_processors[key] is each for key, each in fused.items())
        assert torch.equal(forward(model, inputs), stock)

    def test_fused_projections_with_norms_follow_diffusers_to_the_letter(self):
        variant = VARIANTS["sd3.5"]
        model, inputs = variant.build(), variant.call()
        model.fuse_qkv_projections()
        model.transformer_blocks[0].attn2.set_processor(attention_processor.JointAttnProcessor2_0())
        model.transformer_blocks[0].attn2.fused_projections = False
        expected = forward(model, inputs)
        with applied(model, variant.plan(density=1)):
            assert difference(forward(model, inputs), expected) < 1e-5

    @pytest.mark.parametrize("name", ["wan", "flux", "flux.2", "ltx"])
    def test_fused_projections_after_apply_keep_the_plan(self, name):
        variant, inputs = VARIANTS[name], VARIANTS[name].call()
        model = variant.build()
        apply(model, variant.plan(density=0.4))
        expected = forward(model, inputs)
        model.fuse_qkv_projections()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert difference(forward(model, inputs), expected) < 1e-5

    @pytest.mark.parametrize("name", ["cogvideox-5b", "sd3"])
    def test_processors_that_fusing_swaps_after_apply_are_noticed(self, name):
        variant = VARIANTS[name]
        model = variant.build()
        apply(model, variant.plan(density=0.4))
        model.fuse_qkv_projections()
        with pytest.warns(
            UserWarning, match="2 planned layers .* run without the plan. Call paroattn.remove and apply"
        ):
            forward(model, variant.call())

    def test_an_ip_adapter_runs_dense_beside_the_plan(self, monkeypatch):
        variant, plan = VARIANTS["flux"], VARIANTS["flux"].plan(density=0.4)
        model, inputs = variant.build(), variant.call()
        generator = torch.Generator().manual_seed(5)
        adapter = FluxIPAdapterAttnProcessor(WIDTH, 24)
        for parameter in adapter.parameters():
            parameter.data.normal_(std=0.2, generator=generator).requires_grad_(False)
        model.transformer_blocks[0].attn.set_processor(adapter)
        images = {"joint_attention_kwargs": {"ip_hidden_states": [torch.randn(1, 5, 24, generator=generator)]}}
        keys = list(model.state_dict())
        with masked(model, variant, plan, monkeypatch):
            expected = forward(model, inputs | images)
        with applied(model, plan):
            assert list(model.state_dict()) == keys
            assert difference(forward(model, inputs | images), expected) < 1e-5
            row = report(model).to_dict()["transformer"]["layers"]["transformer_blocks.0.attn"]
        assert (row["sparse_calls"], row["dense_calls"]) == (1, {})
        assert model.transformer_blocks[0].attn.processor is adapter

    def test_attention_that_a_block_leaves_out_is_not_missed(self):
        variant, model = VARIANTS["ltx-2.3"], of(VARIANTS["ltx-2.3"])
        inputs = variant.call() | {"spatio_temporal_guidance_blocks": [1]}
        expected = forward(model, inputs)
        with applied(model, variant.plan(density=1)):
            assert difference(forward(model, inputs), expected) < 1e-5
            rows = report(model).to_dict()["transformer"]["layers"]
        assert [row["sparse_calls"] for row in rows.values()] == [1, 0]


ONE_OF_A_KIND = {variant.transformer: variant for variant in reversed(VARIANTS.values())}
WITH_OR_WITHOUT = pytest.mark.parametrize("planned", [False, True], ids=["without a plan", "with a plan"])


@pytest.fixture
def active_backend():
    """The one that diffusers uses throughout the process, and how to ask for it; set back afterwards."""
    before, _ = _AttentionBackendRegistry.get_active_backend()
    yield lambda: _AttentionBackendRegistry.get_active_backend()[0]
    _AttentionBackendRegistry.set_active_backend(before)


class TestTheFourPropertiesOfABackend:
    """What diffusers' AttentionBackendTesterMixin asks of every backend, of every model, with and without a plan."""

    def on(self, variant, planned, density=0.4):
        backend.paro_backend()
        return applied(of(variant), variant.plan(density=density)) if planned else nullcontext()

    @EVERY
    @WITH_OR_WITHOUT
    def test_set_attention_backend_matches_context_manager(self, variant, planned, active_backend):
        model, inputs = of(variant), variant.call()
        with self.on(variant, planned):
            with attention_backend("paro"):
                expected = forward(model, inputs)
            model.set_attention_backend("paro")
            try:
                assert torch.equal(forward(model, inputs), expected)
            finally:
                model.reset_attention_backend()

    @EVERY
    @WITH_OR_WITHOUT
    def test_output_close_to_native(self, variant, planned, active_backend):
        model, inputs = of(variant), variant.call()
        with attention_backend("native"):
            expected = forward(model, inputs)
        with self.on(variant, planned, density=1):
            model.set_attention_backend("paro")
            try:
                assert difference(forward(model, inputs), expected) < 1e-5
            finally:
                model.reset_attention_backend()
        assert torch.equal(forward(model, inputs), expected)

    @EVERY
    @WITH_OR_WITHOUT
    def test_context_manager_switches_and_restores_backend(self, variant, planned, active_backend):
        model, inputs, before = of(variant), variant.call(), active_backend()
        with self.on(variant, planned):
            expected = forward(model, inputs)
            with attention_backend("paro"):
                assert active_backend() == "paro" != before
                assert difference(forward(model, inputs), expected) < 1e-5
            assert active_backend() == before
            assert torch.equal(forward(model, inputs), expected)

    @pytest.mark.parametrize("variant", ONE_OF_A_KIND.values(), ids=ONE_OF_A_KIND)
    def test_compile(self, variant, active_backend):
        """Whole graphs, no more of them than of the stock model, and none in a second or third call."""
        inputs, graphs = [variant.call(2, seed) for seed in (0, 1)], {}
        for way in ("stock", "without a plan", "with a plan"):
            model = variant.build()
            if way == "without a plan":
                model.set_attention_backend("paro")
            if way == "with a plan":
                apply(model, variant.plan(density=0.4))
            expected = [forward(model, each) for each in inputs]
            torch.compiler.reset()
            counters.clear()
            compile_blocks(model)
            assert difference(forward(model, inputs[0]), expected[0]) < 1e-5
            graphs[way] = counters["stats"]["unique_graphs"]
            for each, wanted in zip(inputs, expected, strict=True):
                assert difference(forward(model, each), wanted) < 1e-5
            assert counters["stats"]["unique_graphs"] == graphs[way] and not counters["graph_break"]
        torch.compiler.reset()
        assert graphs["with a plan"] <= graphs["stock"] and graphs["without a plan"] <= graphs["stock"], graphs


def compile_blocks(model):
    """What compile_repeated_blocks does, also for models of which diffusers does not know what repeats."""
    for name, block in model.named_children():
        if isinstance(block, torch.nn.ModuleList) and "blocks" in name:
            for each in block:
                each.compile(fullgraph=True, backend="eager")


class TestCalibration:
    @EVERY
    def test_the_output_projection_is_what_reaches_the_video(self, variant):
        model = of(variant)
        for name, attn in self_attentions(model).items():
            w_o = output_projection(model, name, attn)
            assert w_o.shape == (HEADS, HEAD_DIM, WIDTH)
        name = variant.layers[-1]
        attn = model.get_submodule(name)
        stream = getattr(attn, "to_out", None)
        linear = model.get_submodule(name.rpartition(".")[0]).proj_out if stream is None else stream
        linear = linear[0] if isinstance(linear, torch.nn.ModuleList) else linear
        x = torch.randn(5, HEADS, HEAD_DIM)
        rest = torch.zeros(5, linear.in_features - WIDTH)
        expected = linear(torch.cat([x.flatten(1), rest], 1)) - linear(torch.zeros(5, linear.in_features))
        assert torch.allclose(torch.einsum("nhd,hdc->nc", x, output_projection(model, name, attn)), expected, atol=1e-5)

    def test_weights_that_are_packed_are_read_through_the_layer(self):
        class Packed(torch.nn.Module):
            def __init__(self, linear):
                super().__init__()
                self.inner, self.in_features = [linear], linear.in_features
                self.weight = torch.nn.Parameter(torch.zeros(7, 1, dtype=torch.uint8), requires_grad=False)

            def forward(self, x):
                assert x.dtype == torch.bfloat16
                return self.inner[0](x.float()).to(x.dtype)

        model = VARIANTS["sd3"].build()
        attn = model.transformer_blocks[0].attn
        expected = output_projection(model, VARIANTS["sd3"].layers[0], attn)
        attn.to_out[0] = Packed(attn.to_out[0])
        found = output_projection(model, VARIANTS["sd3"].layers[0], attn, torch.bfloat16)
        assert found.dtype == torch.bfloat16 and difference(found.float(), expected) < 2**-7

    def test_the_layout_of_the_statistics_stays_that_of_the_first_call(self):
        layout = Layout(Grid(2, 3, 4), TextSpan(5, "prefix"))
        statistics = Statistics("M", 1, 8, layout, CaptureSettings(orders=("FHW",), block=(8, 8), paper=False))
        other = Layout(layout.grid, TextSpan(2, "prefix"))
        q = torch.randn(1, other.tokens, 1, 8)
        statistics.add("a", q, q, q, torch.randn(1, 8, 8), 0.5, block_stats, layout=other)
        assert statistics.layout == layout

    def test_each_expert_gets_the_plan_of_its_own_steps(self):
        pipe: Any = TinyPipeline(tiny_wan(0), FlowMatchEulerDiscreteScheduler(shift=3.0), tiny_wan(1))
        settings = PlanSettings(orders=("FHW", "WHF"), phase_ends=(0.5, 1.0), precision="fp32")
        capture = CaptureSettings(orders=("FHW", "WHF"), block=BLOCK, paper=False)
        given: Any = {"progress": lambda share: None, "capture": capture}
        pipe.__class__ = type("Prompted", (TinyPipeline,), {"__call__": prompted})
        plan = calibrate(pipe, "a cat", steps=6, density=0.5, settings=settings, **given)
        assert list(plan) == ["transformer", "transformer_2"]
        pipe.scheduler.set_timesteps(6)
        high = [level for level in pipe.scheduler.sigmas[:-1].tolist() if level >= 0.6]
        assert plan["transformer"].made["calibration"]["noise_levels"] == pytest.approx(high, abs=1e-4)
        low = plan["transformer_2"].made["calibration"]["noise_levels"]
        assert len(low) == 6 - len(high) and max(low) < 0.6
        apply(pipe, plan)
        pipe(num_inference_steps=6)
        found = report(pipe).to_dict()
        assert [part["calls"] for part in found.values()] == [{"sparse": 2 * len(high)}, {"sparse": 2 * len(low)}]
        with pytest.raises(PlanError, match="the pipeline has transformer, transformer_2; the plan has transformer_2"):
            remove(pipe)
            apply(pipe, type(plan)({"transformer_2": plan["transformer_2"]}))
        pipe.transformer_2 = None
        apply(pipe, plan)
        assert list(report(pipe).transformers) == ["transformer"]


def prompted(self, prompt=None, generator=None, num_inference_steps=4, output_type="latent"):
    return TinyPipeline.__call__(self, num_inference_steps)
