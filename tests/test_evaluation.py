"""Paired metrics against hand-computed values, clips as files and sprite sheets, and what a report holds."""

import base64
import importlib.util
import io
import json
import math
import re
import statistics
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from paroattn.block_mask import BlockMask, blocks_of
from paroattn.evaluation import clip_sections, plan_page, video, wording
from paroattn.evaluation import report as report_module
from paroattn.evaluation.fidelity import Comparison, Fidelity, compare, evaluate, summarise, summarise_pairs
from paroattn.evaluation.maps import AttentionMap
from paroattn.evaluation.pictures import colour_of, map_picture, mask_picture
from paroattn.evaluation.plan_page import draw_plan, write_plan
from paroattn.evaluation.report import ReportData, environment, write_report
from paroattn.evaluation.video import check_clip_path, difference, sprite_sheet, to_pixels, write_clip
from paroattn.grid import ORDERS, Grid, TextSpan
from paroattn.plan.plan import LayerPlan, Phase, TransformerPlan

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
REPORTED = (
    "Clips", "Fidelity", "Attention before and after reordering", "Orders chosen", "Density", "Masks", "What ran",
    "Time", "How this plan was made", "Make this report again",
)  # fmt: skip


def flat(*values, frames=1, height=13, width=17):
    """A clip of plain colours, one (r, g, b) or grey value per frame group."""
    groups = [torch.tensor(value if isinstance(value, tuple) else (value,) * 3).view(1, 3, 1, 1) for value in values]
    return torch.cat([group.expand(frames, 3, height, width) for group in groups])


def smooth(frames=5, height=13, width=19, seed=0):
    """A clip that differs everywhere, like a photograph."""
    coarse = torch.rand(1, 3, frames, 4, 5, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    clip = torch.nn.functional.interpolate(coarse, (frames, height, width), mode="trilinear")
    return clip[0].transpose(0, 1).contiguous()


def a_plan(layers=2, heads=3, phases=2, names="blocks.{}.attn1", orders=("FHW", "HWF", "16x2x2", "WFH", "FWH")):
    grid, block = Grid(4, 5, 13), (64, 32)
    shape = (phases, heads, blocks_of(grid.tokens, 64), blocks_of(grid.tokens, 32))
    generator = torch.Generator().manual_seed(1)
    planned = {}
    for layer in range(layers):
        kept = torch.rand(shape, generator=generator) < 0.2 + 0.1 * layer
        kept[..., 0] = True
        chosen = tuple(orders[(layer + head) % len(orders)] for head in range(heads))
        planned[names.format(layer)] = LayerPlan(
            chosen, BlockMask.from_dense(kept, block), (("fp32",) * heads,) * phases
        )
    share = [2 * (i + 1) / (phases * (phases + 1)) for i in range(phases)]
    ends = [Phase(0.9 - 0.8 * i / phases if i < phases - 1 else 0.0, share[i]) for i in range(phases)]
    return TransformerPlan("TinyTransformer", heads, 64, grid, TextSpan(), block, tuple(ends), planned)


def pair(prompt="a red disc", seed=3, quality=0.9, *, psnr=None, frames=5):
    dense = smooth(frames, seed=seed)
    sparse = quality * dense
    fidelity = compare(dense, sparse)
    fidelity = fidelity if psnr is None else replace(fidelity, psnr=psnr)
    return Comparison(prompt, seed, fidelity, 3.0, 2.0, dense, sparse)


def a_map(layer="blocks.1.attn1", order="HWF"):
    after = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]])
    return AttentionMap(layer, 2, order, torch.full((3, 3), 1 / 3), after, after > 0.2)


def everything(text="a red disc over coffee"):
    """A report in which every text is `text`."""
    rows = [
        {"layer": f"{text}.{i}", "phase": i, "density": 0.25, "sparse_calls": 7, "dense_calls": {text: 1}}
        for i in (0, 1)
    ]
    return ReportData(
        title=text,
        introduction=text,
        clips=[pair(text, seed) for seed in range(2)],
        plan={"transformer": a_plan()},
        maps=[a_map(text)],
        execution={"layers": rows},
        timings={text: 75.0},
        note=text,
        command=text,
        versions={text: text},
    )


class Page(HTMLParser):
    """All elements of a page; fails on one that is not closed."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.open, self.text = [], [], []
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.text.append((self.open[-1] if self.open else "", data))

    def texts(self, tag):
        return [data for name, data in self.text if name == tag]

    def all_text(self):
        return " ".join(" ".join(data for _, data in self.text).split())

    def with_class(self, name):
        return [attrs for _, attrs in self.elements if name in attrs.get("class", "").split()]


def picture(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def frames_of(sheet_pixels, frames, columns, width, height, cell):
    corners = [(frame // columns * cell[1], frame % columns * cell[0]) for frame in range(frames)]
    return np.stack([sheet_pixels[top : top + height, left : left + width] for top, left in corners])


# Metrics


def test_two_plain_greys_have_the_metrics_computed_by_hand():
    found = compare(flat(0.5, frames=3), flat(0.25, frames=3))
    stabiliser = (0.01 * 2) ** 2
    assert found.psnr == pytest.approx(10 * math.log10(4 / 0.0625), abs=1e-9)
    assert found.ssim == pytest.approx((2 * 0.5 * 0.25 + stabiliser) / (0.5**2 + 0.25**2 + stabiliser), abs=1e-6)
    assert found.cosine == pytest.approx(1, abs=1e-12)


def test_psnr_is_over_all_frames_and_ssim_is_the_mean_of_frames():
    one, two = flat(0.5, 0.5), flat(0.25, 0.5)
    stabiliser = (0.01 * 2) ** 2
    first = (2 * 0.5 * 0.25 + stabiliser) / (0.5**2 + 0.25**2 + stabiliser)
    assert compare(one, two).psnr == pytest.approx(10 * math.log10(4 / (0.0625 / 2)), abs=1e-9)
    assert compare(one, two).ssim == pytest.approx((first + 1) / 2, abs=1e-6)


def test_cosine_is_the_angle_between_the_clips_as_vectors():
    assert compare(flat((0.3, 0.4, 0.0)), flat((0.5, 0.0, 0.0))).cosine == pytest.approx(0.6, abs=1e-6)
    assert compare(flat(0.5), flat(-0.5)).cosine == -1
    assert compare(flat(0.0), flat(0.0)).cosine == 1
    assert compare(flat(0.0), flat(0.5)).cosine == 0


def test_ssim_agrees_with_an_independent_implementation_in_float64():
    metrics = pytest.importorskip("skimage.metrics")
    dense, sparse = smooth(3, 24, 37), smooth(3, 24, 37, seed=5)
    settings = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "data_range": 2,
        "channel_axis": 0,
    }
    mirrored = [
        np.pad(clip.double().numpy(), [(0, 0), (0, 0), (5, 5), (5, 5)], mode="reflect") for clip in (dense, sparse)
    ]
    expected = [metrics.structural_similarity(one, two, **settings) for one, two in zip(*mirrored, strict=True)]
    assert compare(dense, sparse).ssim == pytest.approx(np.mean(expected), abs=1e-5)


def test_values_beyond_the_range_are_clipped_first():
    assert compare(flat(3.0), flat(1.0)).identical
    assert compare(flat(-9.0), flat(-1.0)).identical
    assert compare(flat(3.0), flat(0.5)) == compare(flat(1.0), flat(0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_metrics_do_not_depend_on_the_floating_type(dtype):
    assert compare(flat(0.5).to(dtype), flat(0.25).to(dtype)) == compare(flat(0.5), flat(0.25))


def test_identical_clips_have_infinite_psnr_which_is_null_in_json():
    found = compare(smooth(), smooth())
    assert found == Fidelity(math.inf, 1.0, 1.0)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False)) == {
        "psnr": None, "ssim": 1.0, "cosine": 1.0, "identical": True,
    }  # fmt: skip
    assert compare(smooth(), 0.9 * smooth()).to_dict()["identical"] is False


@pytest.mark.parametrize(
    ("dense", "sparse", "error", "message"),
    [
        (
            flat(0.5),
            torch.zeros(1, 3, 13, 17, dtype=torch.uint8),
            TypeError,
            "sparse clip must be floating point.*uint8",
        ),
        (torch.zeros(2, 13, 17, 3), flat(0.5), ValueError, r"dense clip must be \(frames, 3, height, width\).*17, 3"),
        (flat(0.5), flat(0.5, frames=2), ValueError, "one shape"),
        (flat(0.5, height=10), flat(0.5, height=10), ValueError, "11×11"),
        (flat(0.5)[:0], flat(0.5)[:0], ValueError, "frames"),
        (flat(0.5), flat(math.nan), ValueError, "the sparse clip must be finite; 663 of its 663"),
        (flat(math.inf), flat(0.5), ValueError, "the dense clip must be finite"),
    ],
)
def test_clips_that_cannot_be_compared_are_named(dense, sparse, error, message):
    with pytest.raises(error, match=message):
        compare(dense, sparse)


# Summaries


def test_a_summary_has_the_values_computed_by_hand():
    found = summarise([27.0, 20.0, 22.0])
    half = 4.303 * math.sqrt(13) / math.sqrt(3)
    assert (found.mean, found.lowest, found.highest, found.count, found.infinite) == (23, 20, 27, 3, 0)
    assert found.spread == pytest.approx(math.sqrt(13))
    assert found.interval == pytest.approx((23 - half, 23 + half))


@pytest.mark.parametrize(
    ("count", "quantile"), [(2, 12.706), (11, 2.228), (12, 2.2010), (16, 2.1314), (31, 2.0423), (101, 1.9840)]
)
def test_the_interval_uses_students_t(count, quantile):
    values = [float(value) for value in range(count)]
    low, high = summarise(values).interval or (0, 0)
    assert (high - low) / 2 == pytest.approx(quantile * statistics.stdev(values) / math.sqrt(count), rel=2e-4)


def test_one_value_has_no_spread_and_no_interval():
    assert summarise([21.0]).to_dict() == {
        "mean": 21.0, "spread": 0.0, "interval": None, "lowest": 21.0, "highest": 21.0, "count": 1, "infinite": 0,
    }  # fmt: skip


def test_identical_clips_count_but_do_not_enter_the_mean():
    found = summarise([20.0, math.inf, 22.0])
    assert (found.mean, found.lowest, found.highest, found.count, found.infinite) == (21, 20, math.inf, 3, 1)
    assert found.spread == pytest.approx(math.sqrt(2))
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["highest"] is None


def test_a_summary_of_identical_clips_alone_is_infinite():
    found = summarise([math.inf, math.inf])
    assert (found.mean, found.spread, found.interval, found.lowest) == (math.inf, 0, None, math.inf)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["mean"] is None


def test_intervals_of_bounded_metrics_stay_within_their_bounds():
    found = summarise_pairs([Comparison("", 0, Fidelity(*each), 1, 1) for each in ((30, 0.99, 0.5), (20, 0.2, 0.9))])
    assert list(found) == ["psnr", "ssim", "cosine"]
    assert found["ssim"].interval == (-1, 1)
    assert found["psnr"].interval == pytest.approx((25 - 12.706 * 5, 25 + 12.706 * 5))


def test_a_summary_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one value"):
        summarise([])


# Pairs


class Pipeline:
    """Makes clips that depend on prompt, seed and whether it runs dense, and writes down what it was asked."""

    def __init__(self, shape=(2, 3, 13, 17)):
        self.is_dense, self.asked, self.shape = False, [], shape

    def __call__(self, prompt, seed):
        self.asked.append((prompt, seed, self.is_dense))
        noise = torch.rand(self.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        return noise if self.is_dense else noise * 0.5

    @contextmanager
    def dense(self):
        assert not self.is_dense
        self.is_dense = True
        try:
            yield
        finally:
            self.is_dense = False


def test_both_clips_of_a_pair_share_prompt_and_seed_and_only_one_is_dense():
    pipe = Pipeline()
    found = list(evaluate(pipe, ["one", "two"], [5, 6], dense=pipe.dense))
    wanted = [("one", 5), ("one", 6), ("two", 5), ("two", 6)]
    assert [(pair.prompt, pair.seed) for pair in found] == wanted
    assert pipe.asked == [(*each, dense) for each in wanted for dense in (False, True)]
    assert not pipe.is_dense
    for each in found:
        assert each.dense is not None and each.sparse is not None
        assert torch.equal(each.sparse, each.dense * 0.5)
        assert each.fidelity == compare(each.dense, each.sparse)


def test_pairs_come_one_at_a_time():
    pipe = Pipeline()
    pairs = evaluate(pipe, ["one", "two"], dense=pipe.dense)
    assert pipe.asked == []
    next(pairs)
    assert pipe.asked == [("one", 0, False), ("one", 0, True)]


def test_progress_says_what_is_being_made():
    pipe, said = Pipeline(), []
    list(evaluate(pipe, ["one"], [1, 2], dense=pipe.dense, progress=lambda *step: said.append(step)))
    assert said == [
        (0, 4, "sparse: one"),
        (1, 4, "dense: one"),
        (2, 4, "sparse: one"),
        (3, 4, "dense: one"),
        (4, 4, "done"),
    ]


def test_seconds_belong_to_the_clip_they_were_spent_on(monkeypatch):
    pipe, clock = Pipeline(), [0.0]

    def generate(prompt, seed):
        clock[0] += 5 if pipe.is_dense else 2
        return pipe(prompt, seed)

    @contextmanager
    def slow_toggle():
        clock[0] += 100
        with pipe.dense():
            yield
        clock[0] += 100

    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    (found,) = evaluate(generate, ["one"], dense=slow_toggle)
    assert (found.dense_seconds, found.sparse_seconds, found.speed_up) == (5, 2, 2.5)


def test_a_warm_up_makes_the_first_pair_twice_and_is_not_yielded():
    pipe = Pipeline()
    found = list(evaluate(pipe, ["one", "two"], dense=pipe.dense, warm_up=True))
    assert [pair.prompt for pair in found] == ["one", "two"]
    assert pipe.asked[:4] == [("one", 0, False), ("one", 0, True)] * 2


def test_an_error_in_the_dense_clip_leaves_the_pipeline_sparse():
    pipe = Pipeline()

    def generate(prompt, seed):
        if pipe.is_dense:
            raise RuntimeError("out of memory")
        return pipe(prompt, seed)

    with pytest.raises(RuntimeError, match="out of memory"):
        list(evaluate(generate, ["one"], dense=pipe.dense))
    assert not pipe.is_dense


def test_clips_of_another_form_are_refused_before_the_second_is_made():
    pipe = Pipeline(shape=(2, 13, 17, 3))
    with pytest.raises(ValueError, match="the sparse clip must be"):
        list(evaluate(pipe, ["one"], dense=pipe.dense))
    assert len(pipe.asked) == 1


def test_wrong_prompts_are_refused_at_once():
    pipe = Pipeline()
    with pytest.raises(TypeError, match="sequence of strings"):
        evaluate(pipe, "one", dense=pipe.dense)
    with pytest.raises(ValueError, match="1 prompts and 0 seeds"):
        evaluate(pipe, ["one"], [], dense=pipe.dense)


def test_a_record_is_json_and_frames_can_be_dropped():
    found = pair("a disc", 4)
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert (record["prompt"], record["seed"], record["dense_seconds"], record["sparse_seconds"]) == (
        "a disc",
        4,
        3.0,
        2.0,
    )
    assert record["psnr"] == found.fidelity.psnr
    assert found.without_frames().dense is None and found.without_frames().sparse is None
    assert found.without_frames().record() == found.record()


# Clips


def test_pixels_cover_the_range_and_clip_what_is_beyond():
    clip = flat((-1.0, 0.0, 1.0), (-3.0, 0.2, 7.0))
    assert to_pixels(clip)[:, 0, 0].tolist() == [[0, 128, 255], [0, 153, 255]]


@pytest.mark.parametrize("frames", [1, 7, 16])
def test_a_sprite_sheet_gives_every_frame_back(frames):
    clip = smooth(frames)
    sheet = sprite_sheet(clip, fps=8)
    pixels = np.asarray(Image.open(io.BytesIO(sheet.data)).convert("RGB"))
    assert sheet.lossless
    assert (sheet.frames, sheet.width, sheet.height, sheet.fps) == (frames, 19, 13, 8)
    assert sheet.cell == (32, 16)
    assert np.array_equal(pixels[:13, 31], pixels[:13, 18])
    found = frames_of(pixels, frames, sheet.columns, 19, 13, sheet.cell)
    assert np.array_equal(found, to_pixels(clip))


def test_long_clips_keep_every_few_frames_at_the_same_speed():
    clip = smooth(100)
    sheet = sprite_sheet(clip, fps=24)
    pixels = np.asarray(Image.open(io.BytesIO(sheet.data)).convert("RGB"))
    assert (sheet.frames, sheet.fps) == (34, 8)
    assert np.array_equal(frames_of(pixels, 34, sheet.columns, 19, 13, sheet.cell), to_pixels(clip[::3]))


def test_large_clips_become_smaller_and_lossy_to_fit_the_budget():
    clip = smooth(3, 300, 480) + 0.05 * torch.randn(3, 3, 300, 480, generator=torch.Generator().manual_seed(0))
    sheet = sprite_sheet(clip, budget=30_000)
    assert (sheet.width, sheet.height) == (360, 225)
    assert len(sheet.data) <= 30_000
    assert not sheet.lossless
    pixels = np.asarray(Image.open(io.BytesIO(sheet.data)).convert("RGB"))
    found = frames_of(pixels, 3, sheet.columns, 360, 225, sheet.cell).astype(float)
    assert np.abs(found.mean((1, 2)) - to_pixels(clip).mean((1, 2))).max() < 2


def test_the_difference_is_black_where_clips_agree_and_white_from_a_quarter_on():
    dense = flat((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), (0.9, 0.1, 0.1))
    sparse = flat((0.5, 0.5, 0.5), (0.5, 0.375, 0.45), (0.1, 0.1, 0.1))
    assert difference(dense, sparse, 4)[:, :, 0, 0].tolist() == [[-1] * 3, [-0.5] * 3, [1] * 3]
    assert difference(flat(5.0), flat(1.0), 4).eq(-1).all()


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".GIF"])
def test_animations_have_every_frame_at_the_given_speed(tmp_path, suffix):
    path = write_clip(smooth(6), tmp_path / "made" / f"clip{suffix}", fps=10, scale=2)
    with Image.open(path) as image:
        assert (image.size, getattr(image, "n_frames", 1)) == ((38, 26), 6)
        image.seek(1)
        image.load()
        assert image.info["duration"] == 100
        shown = np.asarray(image.convert("RGB").resize((19, 13), Image.Resampling.BOX)).astype(float)
    assert np.abs(shown - to_pixels(smooth(6))[1]).mean() < 12


def test_a_png_holds_all_frames_exactly(tmp_path):
    path = write_clip(smooth(6), tmp_path / "clip.png", scale=1)
    pixels = np.asarray(Image.open(path))
    columns = pixels.shape[1] // 19
    assert np.array_equal(frames_of(pixels, 6, columns, 19, 13, (19, 13)), to_pixels(smooth(6)))


def test_tiny_clips_are_enlarged_smoothly_unless_told_otherwise(tmp_path):
    assert Image.open(write_clip(smooth(1), tmp_path / "a.png")).size == (19 * 19, 13 * 19)
    assert Image.open(write_clip(smooth(1, 250, 300), tmp_path / "b.png")).size == (300, 250)


def test_mp4_holds_the_frames_whatever_their_size(tmp_path):
    pytest.importorskip("av")
    iio = pytest.importorskip("imageio.v3")
    clip = smooth(6, 33, 51)
    read = iio.imread(write_clip(clip, tmp_path / "clip.mp4", fps=5, scale=1), plugin="pyav")
    assert read.shape == (6, 34, 52, 3)
    assert np.abs(read[:, :33, :51].astype(float) - to_pixels(clip)).mean() < 6


def test_mp4_without_a_package_that_writes_it_names_the_package_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r'pip install "imageio\[pyav\]"'):
        check_clip_path(tmp_path / "clip.mp4")
    assert check_clip_path(tmp_path / "clip.gif") == tmp_path / "clip.gif"


def test_either_package_that_writes_mp4_will_do(monkeypatch):
    installed = {"imageio", "imageio_ffmpeg"}
    monkeypatch.setattr(video, "find_spec", lambda name: importlib.util.find_spec("io") if name in installed else None)
    assert video._mp4_plugin()[0] == "FFMPEG"
    installed.add("av")
    assert video._mp4_plugin()[0] == "pyav"


def test_paths_that_cannot_be_written_are_refused_before_any_work(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "clip.gif").mkdir()
    with pytest.raises(ValueError, match=r"\.gif, \.webp, \.png, \.mp4; got 'clip.avi'"):
        check_clip_path(tmp_path / "clip.avi")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        check_clip_path(tmp_path / "clip.gif")
    with pytest.raises(PermissionError, match="file cannot be written"):
        check_clip_path(tmp_path / "file" / "clip.gif")


def test_a_clip_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "clip.gif").write_text("old")

    def fail(pixels, path, fps):
        path.write_text("half")
        raise RuntimeError("disk full")

    monkeypatch.setitem(video._WRITERS, ".gif", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        write_clip(smooth(), tmp_path / "clip.gif")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("clip.gif", "old")]


# Pictures


def test_a_map_is_logarithmic_and_skipped_blocks_are_transparent():
    values = torch.tensor([[1.0, 0.1, 0.01], [1e-9, 0.5, 0.0]])
    kept = torch.tensor([[True, True, True], [True, False, False]])
    drawn = np.asarray(Image.open(io.BytesIO(map_picture(values, kept, (0.01, 1.0)))).convert("RGBA"))
    assert drawn[..., 3].tolist() == [[255, 255, 255], [255, 0, 0]]
    assert drawn[0, 0, :3].tolist() == [255, 246, 208]
    assert drawn[0, 1, :3].tolist() == [63, 143, 139]
    assert drawn[0, 2, :3].tolist() == drawn[1, 0, :3].tolist() == [10, 13, 28]


def test_large_maps_are_pooled():
    values = torch.zeros(300, 520)
    values[:, :260] = 1
    drawn = Image.open(io.BytesIO(map_picture(values, None, (0.01, 1.0)))).convert("RGB")
    assert drawn.size == (256, 256)
    assert drawn.getpixel((10, 100)) == (255, 246, 208) and drawn.getpixel((250, 100)) == (10, 13, 28)


def test_a_mask_is_drawn_in_the_colour_of_its_order():
    kept = torch.tensor([[True, False], [True, True]])
    drawn = mask_picture(kept, "HWF", 64)
    assert np.asarray(drawn)[..., 3].tolist() == [[255, 0], [255, 255]]
    assert "#{:02x}{:02x}{:02x}".format(*np.asarray(drawn)[0, 0, :3]) == colour_of("HWF")
    assert mask_picture(torch.ones(100, 100, dtype=torch.bool), "HWF", 64).size == (64, 64)


def test_every_order_has_a_colour_of_its_own():
    assert len({colour_of(order) for order in (*ORDERS, "4x4x4", "1x8x8", "16x2x2", "4x2x8", "2x3x5")}) == 11


def test_a_drawn_plan_has_every_head_where_it_belongs():
    plan = a_plan(layers=3, heads=5)
    drawn = draw_plan(plan, phase=1)
    pixels = np.asarray(drawn.convert("RGB"))
    assert drawn.width >= 96 + 5 * 110 and drawn.height == 80 + 3 * 128
    for row, layer in enumerate(plan.layers.values()):
        for head, order in enumerate(layer.orders):
            kept = layer.mask[1].dense()[head]
            rows, columns = kept.shape
            for i, j in ((0, 0), (1, 3), (rows - 1, columns - 1)):
                x, y = 96 + head * 110 + int((j + 0.5) * 96 / columns), 80 + row * 128 + int((i + 0.5) * 96 / rows)
                colour = "#{:02x}{:02x}{:02x}".format(*pixels[y, x])
                assert colour == (colour_of(order) if kept[i, j] else "#f0f1f2")


# Reports


def test_an_attention_map_knows_what_it_keeps():
    found = a_map()
    assert found.density == pytest.approx(5 / 9)
    assert found.mass_kept == pytest.approx((0.7 + 0.8 + 0.25 + 0.25 + 0.5) / 3)
    with pytest.raises(ValueError, match="kept like after"):
        replace(found, kept=torch.ones(3, 4, dtype=torch.bool))


def test_a_report_contains_every_part(tmp_path):
    page = Page(write_report(everything(), tmp_path / "report.html"))
    assert tuple(page.texts("h2")) == REPORTED
    assert page.texts("h1") == ["a red disc over coffee"]
    text = page.all_text()
    assert "1 min 15 s" in text and "1.50×" in text
    assert "Kept: 56 % of the blocks, 83.3 % of the attention" in text
    assert "Attention ran 14 times sparse and 2 times dense." in text


def test_a_report_escapes_every_text(tmp_path):
    page = Page(write_report(everything(HOSTILE), tmp_path / "report.html"))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert all(attrs["src"].startswith("data:image/") for tag, attrs in page.elements if tag == "img")
    assert page.texts("h1") == [HOSTILE]
    assert HOSTILE in page.texts("code") and HOSTILE in page.texts("title")
    assert f"Dense: {HOSTILE}" in [attrs.get("aria-label") for _, attrs in page.elements]


def test_a_plan_page_escapes_every_text(tmp_path):
    plan = {"transformer": a_plan(), "transformer_2": a_plan()}
    page = Page(write_plan(plan, tmp_path / "plan.html", title=HOSTILE))
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert page.texts("h1") == [HOSTILE]


@pytest.mark.parametrize(
    "write", [lambda path: write_report(everything(), path), lambda path: write_plan({"transformer": a_plan()}, path)]
)
def test_a_page_loads_nothing_from_anywhere(tmp_path, write):
    page = Page(write(tmp_path / "page.html"))
    for tag, attrs in page.elements:
        for name in ("src", "href", "action", "data", "srcset", "poster"):
            assert attrs.get(name, "data:").startswith("data:"), (tag, name)
    assert re.findall(r"https?:|@import|url\(|\bfetch\(|XMLHttpRequest", page.source) == []
    policy = [attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"]


def test_a_page_adapts_to_the_reader(tmp_path):
    page = Page(write_report(everything(), tmp_path / "report.html"))
    for condition in (
        "prefers-color-scheme: dark",
        "prefers-reduced-motion: reduce",
        "@media print",
        "max-width: 40rem",
    ):
        assert condition in page.source
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.elements
    assert all(attrs.get("aria-label") for tag, attrs in page.elements if tag == "canvas")
    assert all(attrs.get("alt") for tag, attrs in page.elements if tag == "img")
    assert all(attrs.get("aria-label") for attrs in page.with_class("scroll"))
    assert sum(tag == "table" for tag, _ in page.elements) == len(page.with_class("scroll"))
    assert {"play", "time", "frame"} <= {attrs.get("id") for _, attrs in page.elements}


def test_the_clips_on_the_page_are_the_clips(tmp_path):
    data = everything()
    page = Page(write_report(data, tmp_path / "report.html"))
    canvases = [attrs for tag, attrs in page.elements if tag == "canvas"]
    sheets = page.with_class("sheet")
    expected = [
        clip
        for each in data.clips
        if each.dense is not None and each.sparse is not None
        for clip in (each.dense, each.sparse, difference(each.dense, each.sparse, 4))
    ]
    assert len(canvases) == len(sheets) == len(expected) == 6
    for canvas, sheet, clip in zip(canvases, sheets, expected, strict=True):
        number = {name: float(canvas[f"data-{name}"]) for name in ("frames", "columns", "fps", "width", "height")}
        cell = (int(canvas["data-cell-width"]), int(canvas["data-cell-height"]))
        assert (number["frames"], number["fps"], number["width"], number["height"]) == (5, 8, 19, 13)
        found = frames_of(np.asarray(picture(sheet["src"]).convert("RGB")), 5, int(number["columns"]), 19, 13, cell)
        assert np.array_equal(found, to_pixels(clip))
    slider = next(attrs for tag, attrs in page.elements if tag == "input")
    assert (slider["min"], slider["max"]) == ("0", "4")


def test_the_maps_of_a_head_are_before_after_and_kept(tmp_path):
    shown = a_map()
    page = Page(write_report(ReportData("t", maps=[shown]), tmp_path / "r.html"))
    found = [np.asarray(picture(attrs["src"]).convert("RGBA")).tolist() for attrs in page.with_class("map")]
    scale = (0.1 / 3, float(shown.after.max()))
    drawn = [
        map_picture(*part, scale) for part in ((shown.before, None), (shown.after, None), (shown.after, shown.kept))
    ]
    assert found == [np.asarray(Image.open(io.BytesIO(png)).convert("RGBA")).tolist() for png in drawn]
    captions = ["Model's order, FHW", "Order HWF", "Kept: 56 % of the blocks, 83.3 % of the attention"]
    assert page.texts("figcaption") == captions
    assert [attrs["alt"] for attrs in page.with_class("map")] == [
        f"blocks.1.attn1, head 2: {text}" for text in captions
    ]


def test_headline_numbers_are_those_of_the_clips_and_the_plan(tmp_path):
    plan = a_plan()
    clips = [pair(psnr=psnr, seed=seed) for seed, psnr in enumerate((20.0, 23.0, 32.0))]
    page = Page(write_report(ReportData("t", clips=clips, plan={"transformer": plan}), tmp_path / "r.html"))
    text = page.all_text()
    assert (
        "Over 3 pairs of clips" in text
        and "reaches 25.0 ± 6.2 dB PSNR against dense attention (worst clip 20.0 dB)" in text
    )
    assert "makes a clip in 2.0 s instead of 3.0 s, 1.50 times as fast" in text
    assert f"keeps {100 * plan.density:.0f} % of the attention blocks; 5 of 6 heads" in text
    assert "PSNR, dB 25.0 ± 6.2 9.5 … 40.5 20.0 32.0" in text


def test_the_worst_pair_is_always_shown_and_marked(tmp_path):
    clips = [pair(f"prompt {seed}", seed, psnr=30.0 - seed) for seed in range(9)]
    page = Page(write_report(ReportData("t", clips=clips), tmp_path / "r.html"))
    shown = [text.strip() for text in page.texts("h3") if text.strip()]
    assert shown == ["prompt 0", "prompt 1", "prompt 2", "prompt 3", "prompt 4", "prompt 8"]
    assert len(page.with_class("badge")) == 1
    assert "6 of 9 pairs are shown, the worst among them." in page.all_text()
    assert page.all_text().count("prompt 7") == 1


def test_pairs_without_frames_count_but_are_not_shown(tmp_path):
    clips = [pair("kept"), pair("dropped", 5, 0.5).without_frames()]
    page = Page(write_report(ReportData("t", clips=clips), tmp_path / "r.html"))
    assert len([tag for tag, _ in page.elements if tag == "canvas"]) == 3
    assert "1 of 2 pairs are shown." in page.all_text()
    assert "Over 2 pairs" in page.all_text()
    without = Page(write_report(ReportData("t", clips=[clips[1]]), tmp_path / "r.html"))
    assert "Clips" not in without.texts("h2") and "play" not in [attrs.get("id") for _, attrs in without.elements]


def test_identical_clips_read_as_identical(tmp_path):
    same = pair(quality=1.0)
    page = Page(write_report(ReportData("t", clips=[same, same]), tmp_path / "r.html"))
    assert "gives exactly what dense attention gives" in page.all_text()
    assert "PSNR, dB ∞ – ∞ ∞" in page.all_text()
    mixed = Page(write_report(ReportData("t", clips=[same, pair(psnr=20.0)]), tmp_path / "r.html"))
    assert "The mean PSNR leaves out 1 pair of identical clips" in mixed.all_text()
    assert "nan" not in (page.all_text() + mixed.all_text()).lower().split()


def test_a_report_without_anything_is_still_a_page(tmp_path):
    page = Page(write_report(ReportData("nothing yet"), tmp_path / "r.html"))
    assert page.texts("h1") == ["nothing yet"] and page.texts("h2") == []
    assert not re.search(r"\$(title|body)", page.source)


def test_orders_and_densities_are_those_of_the_plan(tmp_path):
    plan = a_plan(layers=3, heads=2, phases=3)
    page = Page(write_plan({"transformer": plan}, tmp_path / "plan.html"))
    orders = [order for layer in plan.layers.values() for order in layer.orders]
    cells = [text for tag, text in page.text if tag == "td"]
    assert [cell for cell in cells if cell in {order.replace("x", "×") for order in orders}] == [
        order.replace("x", "×") for order in orders
    ]
    assert len(page.with_class("order")) == len(page.with_class("density")) == len(page.with_class("mask")) == 6
    shares = torch.tensor([phase.share for phase in plan.phases], dtype=torch.float64)
    mean = 100 * (plan.head_density() * shares[:, None]).sum(1)
    shown = re.findall(r'<td class="density"[^>]*>([^<]*)</td>', page.source)
    assert shown == [f"{value:.0f}" for value in mean.flatten().tolist()]
    first = [density for layer in plan.layers.values() for density in layer.mask[0].head_density().tolist()]
    bars = dict(
        re.findall(
            r'</span> ([^<]+)</th><td[^>]*>[^<]*</td><td class="bar"><span style="width: ([0-9.]+)%', page.source
        )
    )
    most = max(map(orders.count, orders))
    assert {
        order.replace("x", "×"): f"{100 * orders.count(order) / most:.1f}" for order in orders
    }.items() <= bars.items()
    assert bars["HFW"] == "0.0"
    captions = [text for text in page.texts("span") if " · " in text]
    assert captions == [f"{order.replace('x', '×')} · {100 * d:.0f} %" for order, d in zip(orders, first, strict=True)]


def test_the_masks_on_the_page_are_the_masks_of_the_first_phase(tmp_path):
    plan = a_plan()
    page = Page(write_plan({"transformer": plan}, tmp_path / "plan.html"))
    shown = [attrs for tag, attrs in page.elements if tag == "img"]
    masks = [kept for layer in plan.layers.values() for kept in layer.mask[0].dense()]
    for attrs, kept in zip(shown, masks, strict=True):
        assert np.array_equal(np.asarray(picture(attrs["src"]))[..., 3] > 127, kept.numpy())


def test_two_transformers_are_told_apart(tmp_path):
    plan = {"transformer": a_plan(), "transformer_2": a_plan()}
    page = Page(write_report(ReportData("t", plan=plan), tmp_path / "r.html"))
    assert [text for text in page.texts("h2") if text.startswith("Density")] == [
        "Density – transformer",
        "Density – transformer_2",
    ]


def test_what_ran_is_read_with_whatever_is_there(tmp_path):
    rows = [
        {"layer": "blocks.0.attn", "phase": 0, "density": 0.25, "sparse_calls": 3},
        {"layer": "blocks.0.attn", "phase": 1, "density_executed": 0.125, "sparse_calls": 2, "dense_calls": 1},
        {"layer": "blocks.0.attn", "phase": None, "dense_calls": {"other grid": 2, "a mask": 1}},
        {"layer": "blocks.1.attn", "phase": 1, "density": None, "sparse_calls": 0},
    ]
    text = Page(write_report(ReportData("t", execution={"layers": rows}), tmp_path / "r.html")).all_text()
    assert "layer phase 0 phase 1 sparse calls dense calls why dense" in text
    assert "0 25.0 % 12.5 % 5 4 other grid (2); a mask (1) 1 – – 0 0 –" in text


def test_a_report_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_sections, "CLIPS_BUDGET", 60_000)
    noisy = smooth(6, 60, 90) + 0.1 * torch.randn(6, 3, 60, 90, generator=torch.Generator().manual_seed(0))
    clip = Comparison("p", 0, Fidelity(20.0, 0.5, 0.5), 1.0, 1.0, noisy, noisy.flip(0))
    path = write_report(ReportData("t", clips=[clip, clip]), tmp_path / "r.html")
    assert path.stat().st_size < 60_000 * 4 / 3 + 40_000


@pytest.mark.parametrize("write", [write_report, write_plan])
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_drawn(tmp_path, monkeypatch, write):
    (tmp_path / "file").write_text("")
    for module in (report_module, plan_page):
        monkeypatch.setattr(module, "write_page", lambda *_: pytest.fail("worked too early"))
    monkeypatch.setattr(clip_sections, "sprite_sheet", lambda *_, **__: pytest.fail("worked too early"))
    data = everything() if write is write_report else {"transformer": a_plan()}
    with pytest.raises(PermissionError, match="cannot be written"):
        write(data, tmp_path / "file" / "page.html")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        write(data, tmp_path)


def test_the_environment_names_what_ran():
    found = environment()
    assert found["torch"] == torch.__version__ and found["paroattn"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", found["date"])
    assert all(isinstance(value, str) for value in found.values())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.034, "0.03 s"),
        (7.25, "7.2 s"),
        (59.9, "59.9 s"),
        (75.4, "1 min 15 s"),
        (119.7, "2 min 00 s"),
        (3725, "1 h 02 min"),
    ],
)
def test_durations_read_well(seconds, text):
    assert wording.duration(seconds) == text


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["blocks.0.attn1", "blocks.10.attn1"], ["0", "10"]),
        (["transformer_blocks.0.attn", "single_blocks.0.attn"], ["transformer_blocks", "single_blocks"]),
        (["a.0.x", "a.1.x", "b.0.x"], ["a.0", "a.1", "b.0"]),
        (["only.one"], ["only.one"]),
    ],
)
def test_layers_are_named_by_what_differs(paths, names):
    assert wording.short(paths) == names
