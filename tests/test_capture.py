"""Adding up, averaging, saving and loading statistics."""

import json
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from paroattn.capture import CaptureSettings, Statistics
from paroattn.grid import Grid, Layout, TextSpan

SETTINGS = CaptureSettings(orders=("FHW", "WFH"), block=(8, 16), row_stride=2)
LAYOUT = Layout(Grid(2, 3, 5), TextSpan(3, "prefix"))
SHAPE = (2, 2, 4, 2)


@dataclass
class _Measured:
    mass: Tensor
    error: Tensor
    sparse_share: Tensor
    incoherence: Tensor
    output_power: Tensor
    calls: int


def _measure_of(value: float, calls: int, seen: list):
    def measure(q, k, v, w_o, **settings):
        seen.append(settings)
        full, small = torch.full(SHAPE, value * calls), torch.full(SHAPE[:2], value * calls)
        return _Measured(full, 2 * full, small, 3 * small, torch.tensor(value * calls), calls)

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
    blob = bytearray((folder / "statistics.safetensors").read_bytes())
    blob[-1] ^= 1
    (folder / "statistics.safetensors").write_bytes(blob)
    with pytest.raises(ValueError, match="cut short or changed"):
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
