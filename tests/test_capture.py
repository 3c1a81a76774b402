"""Adding up, averaging, saving and loading statistics."""

import errno
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from paroattn.capture import CaptureSettings, Statistics
from paroattn.capture.codes import decode, encode, heaviest, spread
from paroattn.capture.maps import TENSORS, write_whole
from paroattn.capture.measured import BlockStats
from paroattn.grid import Grid, Layout, TextSpan

SETTINGS = CaptureSettings(orders=("FHW", "WFH"), block=(8, 16), row_stride=2)
LAYOUT = Layout(Grid(2, 3, 5), TextSpan(3, "prefix"))
SHAPE = (2, 2, 4, 2)


def _measure_of(value: float, calls: int, seen: list):
    def measure(q, k, v, w_o, **settings):
        seen.append(settings)
        full, small = torch.full(SHAPE, value * calls), torch.full(SHAPE[:2], value * calls)
        return BlockStats(full, 2 * full, small, 3 * small, torch.tensor(value * calls), calls)

    return measure


def _filled() -> tuple[Statistics, list]:
    statistics, seen = Statistics("Model", 2, 4, LAYOUT, SETTINGS), []
    x = torch.zeros(1, 33, 2, 4)
    w_o = torch.zeros(2, 4, 6)
    for layer in ("a", "b"):
        for level, value, calls in ((0.9, 1.0, 1), (0.9, 4.0, 2), (0.2, 5.0, 1)):
            statistics.add(layer, x, x, x, w_o, level, _measure_of(value, calls, seen))
    return statistics, seen


def test_maps_are_averaged_within_a_level_and_levels_count_equally():
    statistics, _ = _filled()
    assert statistics.noise_levels == [0.9, 0.2]
    assert statistics.mean("a", "mass", [0.9])[0, 0, 0, 0] == 3.0  # (1 + 4 + 4) / 3 maps
    assert statistics.mean("a", "error")[1, 1, 3, 1] == 2 * (3.0 + 5.0) / 2


def test_the_sampled_rows_change_from_call_to_call():
    _, seen = _filled()
    assert [settings["row_offset"] for settings in seen[:3]] == [0, 1, 3]
    assert {settings["row_stride"] for settings in seen} == {2}


def test_statistics_survive_save_and_load(tmp_path):
    statistics, _ = _filled()
    statistics.made = {"prompts": ["ü"], "steps": 3}
    again = Statistics.load(statistics.save(tmp_path / "statistics"))
    assert (again.layout, again.settings, again.made) == (LAYOUT, SETTINGS, statistics.made)
    assert again.noise_levels == statistics.noise_levels
    for name in ("mass", "error", "sparse_share", "incoherence", "output_power"):
        assert torch.equal(again.mean("b", name), statistics.mean("b", name))


def test_another_shape_is_refused_before_measuring():
    statistics, seen = _filled()
    count, x = len(seen), torch.zeros(1, 32, 2, 4)
    with pytest.raises(ValueError, match=r"must be \(33, 2, 4\); got \(32, 2, 4\)"):
        statistics.add("a", x, x, x, torch.zeros(2, 4, 6), 0.5, _measure_of(1, 1, seen))
    assert len(seen) == count


def test_damaged_statistics_are_refused(tmp_path):
    statistics, _ = _filled()
    folder = statistics.save(tmp_path / "statistics")
    path = folder / "maps" / "b@0.2.safetensors"
    blob = path.read_bytes()
    for place in (20, blob.index(b"known") + 30, len(blob) - 1):
        path.write_bytes(blob[:place] + bytes([blob[place] ^ 1]) + blob[place + 1 :])
        with pytest.raises(ValueError, match="cut short or changed"):
            loaded = Statistics.load(folder)
            for name in ("mass", "error", "sparse_share", "incoherence", "output_power"):
                loaded.mean("b", name)
    path.write_bytes(blob[:-9])
    with pytest.raises(ValueError, match="cut short or changed"):
        Statistics.load(folder)
    path.unlink()
    with pytest.raises(ValueError, match=r"b at noise level 0.2 is missing"):
        Statistics.load(folder)
    described = json.loads((folder / "statistics.json").read_text())
    (folder / "statistics.json").write_text(json.dumps(described | {"format_version": 99}))
    with pytest.raises(ValueError, match="format 99"):
        Statistics.load(folder)
    with pytest.raises(ValueError, match="holds no statistics"):
        Statistics.load(tmp_path)


@pytest.mark.parametrize("bad", [{"orders": ()}, {"orders": ("FHW", "FHW")}, {"orders": ("FXW",)}, {"row_stride": 0}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="must"):
        CaptureSettings(**bad)


def test_statistics_that_would_not_fit_in_memory_are_refused_with_their_size():
    layout = Layout(Grid(21, 45, 80))
    with pytest.raises(
        ValueError, match=r"below 16 GiB; 40 layers, 10 noise levels, 6 orders and 1182×1182 .* 999 GiB"
    ):
        Statistics("Model", 40, 128, layout, CaptureSettings()).check_size(40, 10)


# In a folder, and in 8 bits


def _error(seed: int, shape=SHAPE) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).pow(3)


def _measure_random(seed: int):
    def measure(q, k, v, w_o, **settings):
        shape = SHAPE if "order" not in settings else (1, *SHAPE[1:])
        power = torch.tensor(1.0 + seed)
        return BlockStats(_error(seed, shape), _error(seed + 1, shape), *(_error(seed, shape[:2]),) * 2, power, 1)

    return measure


def _random(folder=None, **changes) -> Statistics:
    statistics = Statistics("Model", 2, 4, LAYOUT, replace(SETTINGS, **changes))
    if folder is not None:
        statistics.keep_in(folder, ["a", "b"])
    x, w_o = torch.zeros(1, 33, 2, 4), torch.zeros(2, 4, 6)
    for seed, (layer, level) in enumerate((("b", 0.9), ("b", 0.9), ("b", 0.2), ("a", 0.9), ("a", 0.2))):
        statistics.add(layer, x, x, x, w_o, level, _measure_random(seed), (f"{seed}.0",))
    return statistics


def test_a_folder_holds_at_any_moment_what_memory_would(tmp_path):
    memory, kept = _random(), _random(tmp_path / "statistics")
    for statistics in (
        kept,
        Statistics.load(tmp_path / "statistics"),
        Statistics.load(memory.save(tmp_path / "other")),
    ):
        assert statistics.noise_levels == [0.9, 0.2]
        for layer in ("a", "b"):
            for name in TENSORS:
                assert torch.equal(statistics.mean(layer, name), memory.mean(layer, name))
    assert list(kept.layers) == ["a", "b"]  # the model's order, not that of the calls
    assert (kept.units("b", 0.9), kept.units("a", 0.5)) == (("0.0", "1.0"), ())
    assert {path.name for path in tmp_path.rglob("*")} >= {"a@0.9.safetensors", "b@0.2.safetensors"}


def test_statistics_in_a_folder_are_linked_when_they_are_saved(tmp_path):
    kept = _random(tmp_path / "statistics", codes=True)
    kept.save(tmp_path / "again")
    name = "maps/b@0.2.safetensors"
    assert (tmp_path / "statistics" / name).samefile(tmp_path / "again" / name)
    assert Statistics.load(tmp_path / "again").settings.codes


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says which files are mapped")
def test_no_file_stays_in_memory_after_it_was_read(tmp_path):
    kept = _random(tmp_path / "statistics", codes=True)
    for name in TENSORS:
        kept.mean("b", name)
    kept.heaviest("b")
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("columns", [3, 4, 70])
def test_codes_are_off_by_half_a_step_and_what_is_too_small_is_nothing(columns):
    score = torch.rand(2, 3, 9, columns).pow(8) * torch.tensor([1e-20, 1.0, 1e12])[:, None, None]
    score[0, 0, 0, 0], score[1] = 0, score[1] * 1e3
    score[0, 1] = 0
    codes, top = encode(score)
    again = decode(codes, top)
    assert codes.dtype == torch.uint8 and top.shape == (2, 3)
    assert torch.equal(again == 0, score <= 0.9999 * 2 ** (-254.5 / 8) * score.amax((-2, -1), keepdim=True))
    counts = again > 0
    assert (again / score)[counts].log2().abs().max() <= 1 / 16 + 1e-4
    assert torch.equal(encode(again)[0], codes)


def test_the_largest_masses_of_a_row_are_kept():
    mass = torch.rand(2, 3, 5, 11)
    places, values = heaviest(mass)
    again = spread(places, values, 11)
    assert places.shape == (2, 3, 5, 4) and int((again > 0).sum()) == 4 * 30
    assert torch.equal(again.argmax(-1), mass.argmax(-1))
    assert torch.equal(again[again > 0], mass[again > 0])
    assert torch.equal(spread(*heaviest(mass[..., :3]), 3), mass[..., :3])


def test_statistics_in_8_bits_are_small_and_masses_are_kept_on_request(tmp_path):
    exact, small = _random(), _random(tmp_path / "small", codes=True)
    whole = _random(tmp_path / "whole", codes=True, whole_mass=True)
    for layer in ("a", "b"):
        ratio = small.mean(layer, "error", [0.2]) / exact.mean(layer, "error", [0.2])
        assert 0 < (ratio.log2().abs().max()) <= 1 / 16 + 1e-4
        assert torch.equal(small.mean(layer, "mass", [0.2]).argmax(-1), exact.mean(layer, "mass", [0.2]).argmax(-1))
        ratio = whole.mean(layer, "mass", [0.2]) / exact.mean(layer, "mass", [0.2])
        assert ratio.log2().abs().max() <= 1 / 16 + 1e-4
    layout = Layout(Grid(21, 45, 80))
    chosen = Statistics("Model", 40, 128, layout, CaptureSettings(block=(128, 128), codes=True), chosen={"a": ("FHW",)})
    assert chosen.bytes_needed(40, 10) < 6e9


def test_heads_are_measured_in_their_own_order_once_it_is_chosen(tmp_path):
    statistics = Statistics("Model", 2, 4, LAYOUT, SETTINGS, chosen={"a": ("WFH", "FHW")})
    statistics.keep_in(tmp_path / "statistics", ["a"])
    seen = []

    def measure(*args, **settings):
        seen.append(settings)
        return _measure_random(0)(*args, **settings)

    x = torch.zeros(1, 33, 2, 4)
    statistics.add("a", x, x, x, torch.zeros(2, 4, 6), 0.5, measure)
    statistics.note()
    assert seen[0]["order"].tolist() == [1, 0]
    assert Statistics.load(tmp_path / "statistics").chosen == {"a": ("WFH", "FHW")}


def test_what_is_not_finite_is_refused_and_nothing_is_written(tmp_path):
    kept = _random(tmp_path / "statistics")
    before = kept.mean("a", "error")

    def measure(*args, **settings):
        found = _measure_random(0)(*args, **settings)
        found.error[0, 1, 2, 1] = torch.nan
        return found

    x = torch.zeros(1, 33, 2, 4)
    with pytest.raises(ValueError, match="a: what is measured must be finite"):
        kept.add("a", x, x, x, torch.zeros(2, 4, 6), 0.2, measure)
    assert torch.equal(Statistics.load(tmp_path / "statistics").mean("a", "error"), before)


def test_a_full_disk_leaves_whole_files_and_says_so(tmp_path, monkeypatch):
    kept = _random(tmp_path / "statistics")
    before = kept.mean("b", "error")

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    x = torch.zeros(1, 33, 2, 4)
    with pytest.raises(OSError, match=r"b@0\.2\.safetensors cannot be written in .*No space left.* is whole"):
        kept.add("b", x, x, x, torch.zeros(2, 4, 6), 0.2, _measure_random(9))
    monkeypatch.undo()
    assert [path for path in tmp_path.rglob("*") if path.name.endswith(".new")] == []
    assert torch.equal(Statistics.load(tmp_path / "statistics").mean("b", "error"), before)


def test_too_little_space_is_noticed_before_anything_is_measured(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    statistics = Statistics("Model", 2, 4, LAYOUT, SETTINGS)
    statistics.check_size(2, 3)  # in memory
    statistics.keep_in(tmp_path / "statistics", ["a"])
    with pytest.raises(OSError, match=r"must have 0\.0 GB free"):
        statistics.check_size(2, 3)


def test_several_writers_of_one_file_do_not_take_each_others_away(tmp_path):
    path, blobs = tmp_path / "file", [bytes([number]) * 5000 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda blob: [write_whole(path, blob) for _ in range(10)], blobs))
    assert path.read_bytes() in blobs and [each.name for each in tmp_path.iterdir()] == ["file"]
