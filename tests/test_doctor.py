"""`paro doctor`: it finds what is wrong, with machine and kernels, and predicts from what it measured."""

import json
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn

from paroattn.cli import doctor as room
from paroattn.cli import main
from paroattn.evaluation import forecast as predictions
from paroattn.evaluation.forecast import Forecast, forecast, milliseconds, predict, rates_here
from paroattn.grid import Grid, TextSpan
from paroattn.kernels import library, native, selfcheck
from paroattn.plan.cost import rates_of
from paroattn.plan.workloads import WORKLOADS, Workload, workload

CPU, GPU = torch.device("cpu"), SimpleNamespace(type="cuda")
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)  # the interpreter's


@pytest.fixture
def few(monkeypatch):
    """One block size and head dimension, which is enough to see what a check does."""
    monkeypatch.setattr(selfcheck, "BLOCKS", ((64, 128),))
    monkeypatch.setattr(selfcheck, "HEAD_DIMS", (64,))


@pytest.fixture
def quick(monkeypatch):
    """As few rounds as a time can have."""
    monkeypatch.setattr(predictions, "ENOUGH", 0.0)


def paro(capsys, *words) -> tuple[int, dict, str]:
    status = main(["doctor", *map(str, words), "--json"])
    captured = capsys.readouterr()
    return status, json.loads(captured.out) if captured.out else {}, " ".join(captured.err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at the CPU path")
def test_a_healthy_machine_passes_and_every_error_is_a_number(few, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    status, numbers, words = paro(capsys)
    assert status == 0 and numbers["problems"] == [] and "nothing is wrong" in words
    assert numbers["machine"]["torch"] == torch.__version__
    names = [check["what"] for check in numbers["checks"]]
    assert names[0].startswith("reference") and "cpu fp32, blocks 64x128, head dimension 64" in names
    assert all(0 <= check["difference"] <= check["allowed"] for check in numbers["checks"])
    assert numbers["skipped"] and numbers["forecast"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at the CPU path")
def test_without_the_interpreter_it_says_what_a_gpu_would_add(few, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    status, numbers, words = paro(capsys)
    assert status == 0 and "there is no GPU. One adds block-sparse attention in INT8, FP8" in words
    assert not any("triton" in check["what"] for check in numbers["checks"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at the interpreter")
def test_the_interpreter_runs_the_triton_kernels(few, capsys):
    pytest.importorskip("triton")
    _, numbers, _ = paro(capsys)
    found = {check["what"]: check for check in numbers["checks"] if "triton" in check["what"]}
    assert [name.split(",")[0] for name in found] == ["triton int8/int8", "triton fp16"]
    int8, fp16 = found.values()
    assert 1e-3 < int8["error"] < 0.05 and int8["error"] == pytest.approx(int8["reference_error"], rel=0.05)
    assert fp16["error"] < 1e-3


def _with(run):
    known = library.IMPLEMENTATIONS["cpu"]
    return library.Implementation(lambda *a, **kw: run(known.run(*a, **kw)), known.needs, known.usable)


def _failing(result):
    raise RuntimeError("ptxas died")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda result: (result[0] * 1.001, result[1]), "differs from the reference by 0.001"),
        (lambda result: (result[0].roll(1, 1), result[1]), "differs from the reference"),
        (lambda result: (result[0] * float("nan"), result[1]), "differs from the reference by inf"),
        (_failing, "RuntimeError: ptxas died"),
    ],
    ids=["slightly off", "another token", "not a number", "no result"],
)
def test_a_wrong_kernel_is_named_and_the_others_are_still_checked(run, message, few, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(selfcheck, "HEAD_DIMS", (64, 128))
    monkeypatch.setitem(library.IMPLEMENTATIONS, "cpu", _with(run))
    status, numbers, words = paro(capsys, "--device", "cpu")
    assert status == 1 and len(numbers["problems"]) == 2 and len(numbers["checks"]) == 3
    assert message in words and "cpu fp32, blocks 64x128, head dimension 64" in numbers["problems"][0]
    assert "impl='reference'" in words and "nothing is wrong" not in words


def test_a_reference_that_means_something_else_is_found(few, monkeypatch):
    known = library.IMPLEMENTATIONS["reference"]
    changed = library.Implementation(
        lambda *a, **kw: known.run(*a, **kw | {"softmax_scale": kw["softmax_scale"] * 1.01}), known.needs, known.usable
    )
    monkeypatch.setitem(library.IMPLEMENTATIONS, "reference", changed)
    first = next(selfcheck.check_kernels(CPU))
    assert first.problem is not None and first.difference is not None and first.difference > 1e-4


def test_an_error_far_above_the_reference_s_own_is_wrong_even_if_close_to_it():
    check = selfcheck._timed("kernel", 0.01, lambda: (0.05, 0.02, 0.005))
    assert check.problem is not None and "off from float64 by 0.05; the reference by 0.02" in check.problem
    assert selfcheck._timed("kernel", 0.01, lambda: (0.03, 0.02, 0.005)).problem is None
    assert selfcheck._timed("kernel", 0.01, lambda: (0.02, 0.02, 0.0101)).problem is not None


@pytest.mark.parametrize("missing", [None, "kernels need cuda.core"])
@pytest.mark.parametrize(("capability", "precisions"), [((8, 0), 3), ((8, 9), 4), ((9, 0), 4)])
def test_on_a_gpu_every_precision_block_and_head_dimension_is_checked(capability, precisions, missing, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(native, "missing", lambda: missing)
    found, left_out = selfcheck.configurations(torch.device("cuda")), selfcheck.skipped(torch.device("cuda"))
    in_cuda, formats = ("native", 1) if capability[0] == 8 else ("sm90", 2)
    kernels = {"triton", in_cuda} if missing is None else {"triton"}
    assert len(found) == len(set(map(str, found))) == (precisions + formats * (missing is None)) * 4 * 2
    assert {each.impl for each in found} == kernels and {each.dtype for each in found} == {torch.bfloat16}
    assert any(each.precision == "int8/fp8" for each in found) == (capability >= (8, 9))
    assert len(left_out) == (capability < (8, 9)) + (missing is not None)
    what = {8: "int4/int4 on matrix units of four bits", 9: "int8 in CUDA C++"}[capability[0]]
    assert (f"{what}: kernels need cuda.core" in left_out) == (missing is not None)


@pytest.mark.parametrize(
    ("capability", "missing", "words"),
    [
        ((8, 9), None, "int4/int4 of head dimension 64 (native), int4/int4 of head dimension 128 (native)"),
        ((9, 0), None, "int8/int8 of head dimension 64 (sm90), int8/int8 of head dimension 128 (sm90)"),
        ((9, 0), "they need cuda.core", "(sm90), which Triton does slower: they need cuda.core"),
        ((10, 0), None, "nothing, for this GPU Triton's kernels are faster"),
    ],
)
def test_what_runs_in_cuda_c_and_why_not_is_said(capability, missing, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(native, "missing", lambda: missing)
    monkeypatch.setattr(selfcheck, "_query", lambda dim, device: _OnAGpu(dim))
    assert words in selfcheck.in_cuda_here(torch.device("cuda"))


class _OnAGpu:
    def __init__(self, dim):
        self.device, self.dtype, self.shape = torch.device("cuda"), torch.bfloat16, (1, 128, 1, dim)


@pytest.mark.gpu
def test_every_kernel_agrees_with_the_reference_on_this_gpu():
    problems = [check for check in selfcheck.check_kernels(torch.device("cuda")) if check.problem]
    assert problems == []


@pytest.mark.gpu
def test_on_a_gpu_a_layer_is_timed(capsys):
    status, numbers, _ = paro(capsys, "--no-kernels", "--model", "flux", "--density", 0.5)
    measured = numbers["forecast"]["measured"]
    assert status == 0 and measured["tokens"] == 4608 and 0 < measured["dense_ms"] < 1000


def _version(monkeypatch, **found):
    known = room.installed
    monkeypatch.setattr(room, "installed", lambda package: found.get(package, known(package)))


def _capability(monkeypatch, found):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")


def _refusing(*_):
    raise RuntimeError("diffusers must have the attention dispatcher")


WRONG = {
    "torch 2.8 or newer is needed; got 2.7.1": (CPU, lambda m: _version(m, torch="2.7.1")),
    "triton 3.4 or newer is needed; it is not installed": (GPU, lambda m: _version(m, triton=None)),
    "diffusers 0.38 or newer is needed; got 0.37.0": (CPU, lambda m: _version(m, diffusers="0.37.0")),
    "is built for CPUs": (
        CPU,
        lambda m: (m.setattr(room, "_driver", lambda: "580.1"), m.setattr(torch.version, "cuda", None)),
    ),
    "sees no GPU. Update the driver": (
        CPU,
        lambda m: (m.setattr(room, "_driver", lambda: "580.1"), m.setattr(torch.version, "cuda", "13.0")),
    ),
    "compute capability 8.0 or newer (Ampere); got 7.5 (Tesla T4)": (GPU, lambda m: _capability(m, (7, 5))),
    "Unset it": (GPU, lambda m: m.setenv("TRITON_INTERPRET", "1")),
    "needs NumPy before 2.4; got 2.4.0": (
        CPU,
        lambda m: (m.setenv("TRITON_INTERPRET", "1"), _version(m, numpy="2.4.0", triton="3.6.0")),
    ),
    "such as the package python3-dev": (
        GPU,
        lambda m: m.setattr("paroattn.kernels.toolchain.missing", lambda: "such as the package python3-dev"),
    ),
    "which cannot be written": (GPU, lambda m: m.setenv("TRITON_CACHE_DIR", "/proc/none")),
    "attention dispatcher": (CPU, lambda m: m.setattr("paroattn.integration.backend.paro_backend", _refusing)),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_with_a_machine_is_found_and_nothing_else(message, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(room, "_driver", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("paroattn.kernels.toolchain.missing", lambda: None)
    _capability(monkeypatch, (9, 0))
    device, spoil = WRONG[message]
    assert list(room.find_problems(device)) == []
    spoil(monkeypatch)
    (problem,) = room.find_problems(device)
    assert message in problem


def test_a_problem_of_the_machine_ends_the_check_with_status_1(capsys, monkeypatch):
    _version(monkeypatch, torch="2.7.1")
    status, numbers, words = paro(capsys)
    assert status == 1 and numbers["checks"] == [] and "problem: torch 2.8 or newer is needed" in words


def test_a_gpu_that_is_not_wanted_is_no_problem(monkeypatch):
    monkeypatch.setattr(room, "_driver", lambda: "580.1")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert list(room.find_problems(CPU, asked=True)) == []


def test_the_driver_s_version_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "DRIVER", tmp_path / "version")
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release\n")
    assert room._driver() == "580.95.05"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is something to measure on")
def test_without_a_gpu_nothing_is_predicted_but_the_share_of_flops_is_said(capsys):
    status, numbers, words = paro(capsys, "--no-kernels", "--model", "wan-14b", "--size", "720p", "--density", 0.2)
    assert status == 0 and numbers["forecast"]["measured"] is None and numbers["forecast"]["tokens"] == 75600
    assert numbers["forecast"]["attention_share_of_flops"] == pytest.approx(0.7215, abs=1e-4)
    assert "there is no GPU to measure on" in words


def test_models_and_their_sizes_are_listed(capsys):
    status, numbers, _ = paro(capsys, "--model", "list")
    assert status == 0 and numbers["models"]["wan-14b"]["720p"]["tokens"] == 75600
    assert set(numbers["models"]) == set(WORKLOADS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "sora"], "model must be one of wan-1.3b"),
        (["--model", "wan-14b", "--size", "huge"], "size must be 480p, 720p or FRAMESxHEIGHTxWIDTH"),
        (["--model", "wan-14b", "--size", "81x8x8"], "at least 16x16 pixels"),
        (["--size", "720p"], "--size needs --model"),
        (["--density", 0], "density must be above 0"),
        (["--density", 1.1], "density must be above 0 and at most 1; got 1.1"),
    ],
)
def test_a_wrong_question_is_refused_before_any_work(words, message, capsys):
    assert main(["doctor", *map(str, words)]) == 2
    line = " ".join(capsys.readouterr().err.split())
    assert message in line and "processor" not in line


def test_a_gpu_that_is_not_there_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor", "--device", "cuda"]) == 2
    assert "needs a GPU that PyTorch sees; got none" in " ".join(capsys.readouterr().err.split())


GRIDS = {
    ("wan-14b", "480p"): ((21, 30, 52), 32760),
    ("wan-14b", "720p"): ((21, 45, 80), 75600),
    ("wan2.2-5b", "720p"): ((31, 22, 40), 27280),
    ("cogvideox-5b", "480p"): ((13, 30, 45), 17776),
    ("cogvideox1.5-5b", "768p"): ((11, 48, 85), 45106),
    ("hunyuanvideo", "720p"): ((33, 45, 80), 119056),
    ("hunyuanvideo-1.5", "720p"): ((31, 45, 80), 113585),
    ("mochi", "480p"): ((28, 30, 53), 44776),
    ("ltx-video", "512p"): ((21, 16, 22), 7392),
    ("flux", "1024"): ((1, 64, 64), 4608),
    ("sd3.5-large", "1024"): ((1, 64, 64), 4429),
    ("wan-1.3b", "49x480x832"): ((13, 30, 52), 20280),
}


@pytest.mark.parametrize(("name", "size"), GRIDS, ids=str)
def test_sequences_are_those_of_the_real_models(name, size):
    layout = workload(name).layout(size)
    assert (tuple(layout.grid), layout.tokens) == GRIDS[name, size]


SD35 = {"num_attention_heads": 38, "num_layers": 38, "caption_projection_dim": 2432, "qk_norm": "rms_norm"}
PUBLISHED = {
    "wan-1.3b": ("WanTransformer3DModel", {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}),
    "wan-14b": ("WanTransformer3DModel", {}),
    "wan2.2-5b": ("WanTransformer3DModel", {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336}),
    "cogvideox-2b": ("CogVideoXTransformer3DModel", {}),
    "cogvideox-5b": ("CogVideoXTransformer3DModel", {"num_attention_heads": 48, "num_layers": 42}),
    "hunyuanvideo": ("HunyuanVideoTransformer3DModel", {}),
    "hunyuanvideo-1.5": ("HunyuanVideo15Transformer3DModel", {}),
    "ltx-video": ("LTXVideoTransformer3DModel", {}),
    "ltx-2": ("LTX2VideoTransformer3DModel", {}),
    "mochi": ("MochiTransformer3DModel", {}),
    "flux": ("FluxTransformer2DModel", {}),
    "flux2": ("Flux2Transformer2DModel", {}),
    "qwen-image": ("QwenImageTransformer2DModel", {}),
    "sd3.5-large": ("SD3Transformer2DModel", SD35 | {"attention_head_dim": 64, "joint_attention_dim": 4096}),
}
NOT_PER_VIDEO_TOKEN = (
    "add_", "to_add", "context", "txt", "norm", "mod", "audio", "_to_", "refiner", "attn2.to_k", "attn2.to_v",
)  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_work_around_attention_is_that_of_the_published_configuration(name):
    """Weights that every video token meets, counted in the model itself, which takes no memory on the meta device."""
    class_name, config = PUBLISHED[name]
    with torch.device("meta"):
        transformer = getattr(diffusers, class_name)(**config)
    weights = sum(
        module.weight.numel()
        for path, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and "blocks." in path and not any(part in path for part in NOT_PER_VIDEO_TOKEN)
    )
    model, size = workload(name), next(iter(WORKLOADS[name].sizes))
    assert model.flops(size)[1] * model.layers / (2 * model.layout(size).tokens) == pytest.approx(weights, rel=1e-6)
    assert (transformer.config.num_attention_heads, transformer.config.attention_head_dim) == (
        model.heads, model.head_dim,
    )  # fmt: skip


def test_every_model_is_compared_with_its_configuration():
    assert set(WORKLOADS) - set(PUBLISHED) == {"cogvideox1.5-5b"}  # the same transformer as 1.0


def test_flops_are_two_products_of_all_pairs_and_two_for_every_weight():
    model = Workload(2, 8, 3, {"x": (5, 8, 16)}, (4, 8, 8), feed_forward=4, cross=2, text=TextSpan(3))
    tokens = 2 * 1 * 2 + 3
    assert model.layout("x").grid == Grid(2, 1, 2)
    assert model.flops("x") == (2 * 2 * tokens**2 * 16, 2 * tokens * (4 + 2 + 4) * 16**2)


SMALL = Workload(2, 64, 3, {"x": (9, 128, 128)}, (4, 8, 8), cross=2, text=TextSpan(7, "prefix"))


def test_a_forecast_adds_what_is_around_attention_to_both_sides_in_every_layer():
    found = Forecast(SMALL, "a GPU", 100, 0.3, 6.0, {"int8": 1.0}, {"eager": 4.0, "compiled": 2.0})
    assert found.attention_share("compiled") == 0.75 and found.attention_share("eager") == 0.6
    assert found.forward_ms(None, "eager") == 30.0 and found.forward_ms("int8", "compiled") == 9.0
    row = found.to_dict()["sparse"]["int8"]
    assert row["ms"] == 1.0 and row["attention_speed_up"] == 6.0
    assert row["forward_speed_up"] == {"eager": 2.0, "compiled": pytest.approx(8 / 3)}


def test_a_forecast_here_rests_on_what_is_timed_here(quick):
    found = forecast(SMALL, "x", 0.25, ("fp32", "int8"), device="cpu", dtype=torch.float32)
    assert found.tokens == 3 * 16 * 16 + 7 and list(found.sparse_ms) == ["fp32", "int8"] and found.gpu == "cpu"
    assert min(found.dense_ms, *found.around_ms.values(), *found.sparse_ms.values()) > 0
    blocks, kept = 13, 12 * 3 + 2 * 12 + 1  # every row keeps 3 of 12 blocks; text is dense both ways
    assert found.density == pytest.approx(kept / blocks**2)


def test_what_was_timed_comes_back_at_the_same_size_and_the_rest_is_scaled(monkeypatch):
    known, layout = rates_of("NVIDIA H200"), SMALL.layout("x")
    monkeypatch.setattr(predictions, "_time_attention", lambda *_: (50.0, {"int8": 20.0}))
    monkeypatch.setattr(predictions, "_time_matrices", lambda *_: (3.0, 2.0))
    rates = rates_here(SMALL, layout, 0.25, ("int8",), (64, 64), CPU, torch.float32)
    found = predict(rates, SMALL, "x", 0.25, ("int8",))
    assert found.dense_ms == pytest.approx(50.0) and found.sparse_ms["int8"] == pytest.approx(20.0)
    assert rates.linear_ms(SMALL, 775) == pytest.approx(3 * known.linear_ms(SMALL, 775))
    assert rates.other_ms(SMALL, 775) == pytest.approx(2 * known.other_ms(SMALL, 775))
    denser = predict(rates, SMALL, "x", 0.5, ("int8",))
    assert 1.5 < denser.sparse_ms["int8"] / found.sparse_ms["int8"] < 2.0


def test_on_a_gpu_whose_rates_are_packaged_attention_alone_is_timed(monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(predictions, "_time_attention", lambda *_: (50.0, {"int8/fp8": 20.0}))
    monkeypatch.setattr(predictions, "_time_matrices", refuse)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    model = workload("wan-14b")
    rates = rates_here(model, model.layout("480p"), 0.25, ("int8/fp8",), (64, 64), torch.device("cuda"), torch.bfloat16)
    known = rates_of("NVIDIA H200")
    assert rates.linear_tflops == known.linear_tflops and rates.around_ps == known.around_ps


def test_the_doctor_says_what_a_forward_takes_dense_and_by_block_masks(monkeypatch, capsys):
    rates, asked = rates_of("NVIDIA H200"), []

    def known(model, size, density, precisions, *, block, device):
        asked.append((precisions, block))
        return predict(rates, model, size, density, ("int8/fp8", "int8"), block=block)

    monkeypatch.setattr(predictions, "forecast", known)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    args = SimpleNamespace(size="720p", density=0.2, block="128x128")
    found = room._forecast(args, GPU, "wan-14b")
    words = " ".join(capsys.readouterr().err.split())
    assert asked == [(("int8/fp8", "int8", "bf16"), (128, 128))]
    row = found["measured"]["sparse"]["int8/fp8"]
    assert found["measured"]["forward_ms"]["compiled"] == pytest.approx(11225, rel=0.03)
    assert row["forward_speed_up"]["compiled"] == pytest.approx(2.7, abs=0.1)
    told = f"{row['forward_ms']['compiled']:.0f} ms, {row['forward_speed_up']['compiled']:.2f}×"
    assert told in words and "rates of NVIDIA H200" in words


@pytest.mark.parametrize("density", [0.05, 0.5, 1.0])
def test_what_is_timed_keeps_as_many_blocks_as_are_asked_for(density, monkeypatch):
    kept = []
    monkeypatch.setattr(predictions, "attention", lambda q, k, v, mask, **rest: kept.append(mask.density))

    def timed(call, device):
        call()
        return 1.0

    monkeypatch.setattr(predictions, "milliseconds", timed)
    model = Workload(2, 64, 2, {"x": (9, 192, 192)}, (4, 8, 8))
    forecast(model, "x", density, ("fp32",), device="cpu", dtype=torch.float32)
    assert kept == [pytest.approx(density, abs=0.03)]


def test_a_call_is_timed_after_it_ran_before_and_often_enough(quick):
    calls = []
    assert milliseconds(lambda: calls.append(1), CPU) >= 0
    assert len(calls) == 2 + predictions.LEAST_ROUNDS
