"""The registered operation: what PyTorch's compilers, CUDA graphs and devices see of it, and how it is refused."""

import shutil
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_kernels import sqnr
from test_triton import DEVICE, Case
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs

import paroattn
from paroattn.block_mask import BlockMask, blocks_of
from paroattn.grid import Grid, TextSpan
from paroattn.kernels import attention as public
from paroattn.kernels import cpu, library, prepare, sparse, toolchain
from paroattn.precision import Precision

OP = torch.ops.paroattn.attention.default
pytestmark = pytest.mark.filterwarnings(
    "ignore:Conversion of an array with ndim:DeprecationWarning",  # the interpreter's
)
IMPLS = [("cpu", "fp32"), ("reference", "int8/fp8"), ("triton", "int8")]
TEXT = TextSpan(23, "prefix")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Forget compiled code and what it counted, and let nothing be computed by chance of an earlier warning."""
    torch.compiler.reset()
    counters.clear()
    library._warned.clear()
    yield
    torch.compiler.reset()


def layer(seed: int, **settings) -> Case:
    """Another layer of the same shape: other values, mask and orders."""
    case = Case(TEXT, True, grid=Grid(2, 5, 7) if DEVICE == "cpu" else Grid(5, 14, 17), **settings)
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(case.mask.dense().shape, generator=generator) < 0.5
    kept[..., 0] = True
    case.mask = BlockMask.from_dense(kept, case.mask.block).to(DEVICE)
    case.order = torch.randperm(5, generator=generator)[:3].to(case.order)
    case.q = case.q.roll(seed, 1)
    return case


def flat(case: Case, impl: str, precision: str, return_lse: bool, padded: bool) -> tuple:
    """Arguments of the registered operation."""
    mask, valid = case.mask, case.valid if padded else None
    launch_order = mask.launch_order if impl == "triton" else None
    return (
        case.q, case.k, case.v, mask.bits, mask.key_blocks, *mask.block, launch_order, case.table, case.order, valid,
        case.text_tokens, precision, 0.3, return_lse, impl,
    )  # fmt: skip


def call(case: Case, **settings) -> Any:
    return paroattn.attention(
        case.q, case.k, case.v, case.mask, table=case.table, order=case.order, text_tokens=case.text_tokens,
        valid_text=case.valid_text, **settings,
    )  # fmt: skip


@pytest.mark.parametrize(("impl", "precision"), IMPLS)
@pytest.mark.parametrize(("return_lse", "padded"), [(True, True), (False, False)])
@pytest.mark.skipif(DEVICE == "cuda", reason="the operation on a GPU has its own test")
def test_the_operation_passes_pytorch_s_checks(impl, precision, return_lse, padded):
    torch.library.opcheck(OP, flat(layer(1), impl, precision, return_lse, padded))


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "precision"), [("triton", "bf16"), ("auto", "int8"), ("reference", "int8/fp8")])
@pytest.mark.parametrize("return_lse", [True, False])
def test_the_operation_passes_pytorch_s_checks_on_a_gpu(impl, precision, return_lse):
    torch.library.opcheck(OP, flat(layer(1, dtype=torch.bfloat16), impl, precision, return_lse, True))


@pytest.mark.parametrize(("impl", "precision"), IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("return_lse", [True, False])
def test_what_compilers_expect_is_what_comes_out(impl, precision, dtype, return_lse):
    if impl == "cpu" and (dtype != torch.float32 or DEVICE == "cuda"):
        pytest.skip("the CPU path computes in float32")
    arguments = flat(layer(1, dtype=dtype), impl, precision, return_lse, True)
    with FakeTensorMode() as mode:
        expected = OP(*(mode.from_tensor(x) if isinstance(x, Tensor) else x for x in arguments))
    for got, fake in zip(OP(*arguments), expected, strict=True):
        assert (got.shape, got.stride(), got.dtype, got.device) == (fake.shape, fake.stride(), fake.dtype, fake.device)


SETTINGS = [{"impl": impl, "precision": precision} for impl, precision in IMPLS]
SETTINGS += [
    {"impl": "triton", "precision": ["int8", "fp16", "int8"]},
    {"precision": ["fp32", "int8/fp8", "fp32"]},
    {"precision": Precision("int8", "int4")},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda x: "-".join(map(str, x.values())))
@pytest.mark.skipif(DEVICE == "cuda", reason="compiled code on a GPU has its own test")
def test_all_layers_share_one_graph(settings):
    def function(case: Case) -> Any:
        return call(case, return_lse=True, **settings)[0] + 1

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(1, 4):
            case = layer(seed)
            _ = case.mask.launch_order
            torch.testing.assert_close(compiled(case), function(case), atol=1e-6, rtol=0)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.skipif(DEVICE != "cpu" or shutil.which("g++") is None, reason="TorchInductor needs g++ on a CPU")
def test_inductor_s_code_calls_the_operation():
    def function(q: Tensor, case: Case) -> Any:
        case.q = q * 2
        return call(case, impl="cpu") + 1

    case = layer(1)
    with torch.no_grad():
        expected = function(case.q, layer(1))
        torch.testing.assert_close(torch.compile(function, fullgraph=True)(case.q, case), expected, atol=1e-6, rtol=0)


def test_a_launch_order_that_compiled_code_needs_is_made_in_it_and_not_kept():
    compiled = torch.compile(lambda case: call(case, impl="triton", precision="int8"), fullgraph=True, backend="eager")
    with torch.no_grad():
        for seed in (1, 2):
            case = layer(seed)
            got = compiled(case)
            assert case.mask._launch_order is None
            assert torch.equal(got, call(case, impl="triton", precision="int8"))
            assert case.mask._launch_order is case.mask.launch_order
    assert counters["stats"]["unique_graphs"] == 1


def test_a_given_launch_order_is_the_one_that_is_used(monkeypatch):
    case, given, attend = layer(1), [], sparse.attend
    monkeypatch.setattr(
        sparse, "attend", lambda *args, **kw: given.append(sparse.launch_order(kw["mask"])) or attend(*args, **kw)
    )
    for _ in range(2):
        call(case, impl="triton", precision="int8")
    assert [x is case.mask.launch_order for x in given] == [True, True]


def test_what_kernels_keep_is_made_while_a_caller_is_compiled():
    """Made at the first run it would lie in the memory of a CUDA graph."""
    sizes = []

    def recording(graph, inputs):
        sizes.append(prepare._signs.cache_info().currsize)
        return graph.forward

    prepare._signs.cache_clear()
    case = layer(1)
    with torch.no_grad():
        torch.compile(lambda case: call(case, impl="triton", precision="int8"), backend=recording)(case)
    assert sizes == [1]
    assert type(prepare._signs(64, torch.float32, case.q.device)) is Tensor
    assert prepare._signs.cache_info().currsize == 1


@pytest.mark.parametrize("fullgraph", [True, False])
def test_gradients_are_refused_under_compile_too(fullgraph):
    case = layer(1)
    case.k.requires_grad_()
    compiled = torch.compile(lambda: call(case, impl="reference"), fullgraph=fullgraph, backend="eager")
    with pytest.raises((ValueError, RuntimeError), match="attention has no gradient; got tensors that require one"):
        compiled()
    with torch.no_grad():
        assert not compiled().requires_grad


class Operations(TorchDispatchMode):
    """Names of all ATen calls."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


SYNCHRONISING = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal"}


def test_a_second_call_reads_no_values_on_the_host():
    case = layer(1)
    case.valid_text = None  # on a CPU its values are checked every time
    for expected in (True, False):
        with Operations() as seen:
            call(case, impl="triton", precision="int8")
        assert bool(SYNCHRONISING & set(seen.names)) == expected
    with Operations() as inside:
        library._attention(*flat(case, "triton", "int8", True, True))
    assert "empty" in inside.names
    assert not SYNCHRONISING & set(inside.names)


@pytest.mark.skipif(DEVICE == "cuda", reason="spells the values of a CPU call")
def test_values_are_not_looked_at_under_compile():
    case = layer(1)
    case.table = case.table.clamp(1)
    with torch.no_grad(), pytest.raises(ValueError, match="each position once"):
        call(case, impl="reference")
    compiled: Any = torch.compile(lambda: call(case, impl="reference"), fullgraph=True, backend="eager")
    with torch.no_grad():
        assert compiled().shape == case.q.shape


def test_masks_that_share_their_bits_have_schedules_of_their_own():
    bits = torch.tensor([[1, 3], [3, 2]], dtype=torch.uint8)[..., None]
    q = torch.randn(1, 40, 2, 8, generator=torch.Generator().manual_seed(0))
    for size in (32, 24, 32):
        mask = BlockMask(bits, 2, (size, size))
        out, expected = (paroattn.attention(q, q, q, mask, impl=impl) for impl in ("cpu", "reference"))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    assert len(cpu._schedules[bits]) == 2


def on_a_gpu(dtype: torch.dtype = torch.bfloat16, dim: int = 64, block=(64, 64)) -> tuple[Tensor, BlockMask]:
    """Tensors without memory that say they are on a GPU."""
    with FakeTensorMode():
        q = torch.empty(1, 300, 2, dim, dtype=dtype, device="cuda:0")
        bits = torch.empty(2, blocks_of(300, block[0]), 1, dtype=torch.uint8, device="cuda:0")
    return q, BlockMask(bits, blocks_of(300, block[1]), block)


def test_values_are_not_looked_at_during_a_capture(monkeypatch):
    with FakeTensorMode():
        table, order = (torch.empty(*shape, dtype=torch.int32, device="cuda:0") for shape in ((2, 300), (3,)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    public._check_order_values(table, order)
    assert table not in public._checked_tables


@pytest.mark.parametrize(
    ("dtype", "precision"),
    [
        (torch.bfloat16, None),
        (torch.float16, None),
        (torch.bfloat16, "int8"),
        (torch.bfloat16, "int8/fp8"),
        (torch.float32, "int8"),
        (torch.float32, "bf16"),
        (torch.bfloat16, ["int8", "bf16"]),
    ],
)
def test_on_a_gpu_triton_runs_by_itself(dtype, precision):
    q, mask = on_a_gpu(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert public.what_runs(q, mask, precision=precision) == "triton"


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({"dtype": torch.float32}, {}, "no kernel computes fp32 on torch.float32 tensors. Give another precision"),
        ({"dtype": torch.float64}, {}, "no kernel computes fp64 on torch.float64"),
        ({"dtype": torch.float64}, {"precision": "int8"}, "no kernel computes int8 on torch.float64"),
        ({}, {"precision": "fp8/fp8"}, "no kernel computes fp8/fp8 on torch.bfloat16"),
        ({}, {"precision": "fp8/int4"}, "no kernel computes fp8/int4"),
        ({"dim": 136}, {}, "the head dimension must be at most 128 .* got 136"),
        ({"block": (32, 64)}, {}, "blocks must be one of 64x64, .*; got 32x64"),
        ({}, {"softmax_scale": 0.0}, r"softmax_scale must be above 0 .* got 0\.0"),
    ],
)
def test_on_a_gpu_what_no_kernel_handles_runs_in_the_reference_and_says_so_once(tensors, settings, message):
    q, mask = on_a_gpu(**tensors)
    with pytest.warns(UserWarning, match=f"The slow but exact reference runs on cuda:0, because {message}"):
        assert public.what_runs(q, mask, **settings) == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert public.what_runs(q, mask, **settings) == "reference"
        assert public.what_runs(q, mask, impl="reference", **settings) == "reference"


def test_on_a_cpu_the_reference_needs_no_warning_and_the_interpreter_an_order():
    case = layer(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        q, mask = case.q.cpu(), case.mask.to("cpu")
        assert public.what_runs(q, mask) == "cpu"
        assert public.what_runs(q, mask, precision="int8") == "reference"
        assert public.what_runs(q, mask, precision=["fp32", "int8", "fp32"]) == "cpu + reference"


@pytest.mark.parametrize(
    ("impl", "precision", "message"),
    [
        ("triton", "fp8/int4", "triton needs tensors on a GPU, .* got fp8/int4 on torch.bfloat16 tensors on cuda:0"),
        ("cpu", None, "cpu needs float32 tensors on a CPU .* got bf16 on torch.bfloat16 tensors on cuda:0"),
        ("auto", "fp64", "reference needs float64 tensors for precision fp64; got fp64 on torch.bfloat16"),
        ("cuda", None, "impl must be auto or one of cpu, reference, triton, native, sm90; got 'cuda'"),
    ],
)
def test_what_cannot_run_on_a_gpu_is_refused(impl, precision, message):
    q, mask = on_a_gpu()
    with pytest.raises(ValueError, match=message):
        public.what_runs(q, mask, precision=precision, impl=impl)


def test_a_gpu_without_triton_is_an_error_and_no_slow_surprise(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "paroattn.kernels.sparse", None)
    q, mask = on_a_gpu()
    with pytest.raises(RuntimeError, match=r"needs Triton 3.4 or newer; got .* or use impl='reference'"):
        public.what_runs(q, mask)


@pytest.mark.parametrize(
    ("capability", "precision", "message"),
    [
        ((7, 5), "int8", r"int8 needs a GPU of compute capability 8\.0 or higher; got 7\.5 \(T4\). Use impl='refer"),
        ((7, 0), "fp16", r"fp16 needs .* 8\.0 or higher; got 7\.0 \(T4\). Use impl='reference'"),
        ((8, 6), "int8/fp8", r"fp8 needs .* 8\.9 or higher; got 8\.6 \(T4\). Use precision 'int8', which it has"),
    ],
)
def test_an_old_gpu_is_refused_before_anything_runs(monkeypatch, capability, precision, message):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    q, mask = on_a_gpu(torch.float16)
    with pytest.raises(RuntimeError, match=message):
        sparse._check(q, mask, Precision.parse(precision), 0.3)


class TestToolchain:
    @pytest.fixture(autouse=True)
    def nothing_built_yet(self, monkeypatch, tmp_path):
        toolchain.check_toolchain.cache_clear()
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setattr(knobs.build, "impl", None)
        monkeypatch.delenv("CC", raising=False)
        self.programs = {"gcc", "clang"}
        monkeypatch.setattr(shutil, "which", lambda name: name if name in self.programs else None)
        (tmp_path / "include").mkdir()
        self.header = tmp_path / "include" / "Python.h"
        self.header.touch()
        monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: str(tmp_path / name))
        yield
        toolchain.check_toolchain.cache_clear()

    @pytest.mark.parametrize("programs", [{"gcc"}, {"clang"}, {"gcc", "clang"}])
    def test_either_compiler_will_do(self, programs):
        self.programs = programs
        toolchain.check_toolchain()

    def test_no_compiler_is_an_error_with_a_remedy(self, monkeypatch):
        self.programs = {"cc"}
        message = "needs a C compiler; found neither gcc nor clang on PATH. Install .* Or use impl='reference'"
        with pytest.raises(RuntimeError, match=message):
            toolchain.check_toolchain()
        monkeypatch.setenv("CC", "cc")
        toolchain.check_toolchain()

    def test_a_compiler_that_is_named_and_not_there_is_an_error(self, monkeypatch):
        monkeypatch.setenv("CC", "icc")
        with pytest.raises(RuntimeError, match=r"needs a C compiler; got CC=icc, which is no program\. Set CC"):
            toolchain.check_toolchain()

    def test_missing_headers_are_an_error_with_a_remedy(self):
        self.header.unlink()
        with pytest.raises(RuntimeError, match=r"needs Python's headers; found no Python\.h in .*include.*python3-dev"):
            toolchain.check_toolchain()

    def test_debian_s_own_scheme_is_read_as_triton_reads_it(self, monkeypatch):
        asked = []
        monkeypatch.setattr(sysconfig, "get_default_scheme", lambda: "posix_local")
        monkeypatch.setattr(sysconfig, "get_path", lambda name, scheme: asked.append(scheme) or str(self.header.parent))
        toolchain.check_toolchain()
        assert asked == ["posix_prefix"]

    def test_what_was_built_before_needs_no_compiler(self):
        self.programs = set()
        built = Path(knobs.cache.dir) / "ABC"
        built.mkdir(parents=True)
        (built / "__triton_launcher.so").touch()
        toolchain.check_toolchain()
        assert "neither gcc nor clang" in (toolchain.missing() or "")

    @pytest.mark.parametrize("gone", ["the builder is another", "nothing is built"])
    def test_a_triton_that_builds_otherwise_is_left_alone(self, gone, monkeypatch):
        self.programs = set()
        if gone == "nothing is built":
            monkeypatch.delattr(toolchain.driver, "compile_module_from_src")
        else:
            monkeypatch.setattr(knobs.build, "impl", print)
        toolchain.check_toolchain()

    def test_kernels_ask_before_they_start_on_a_gpu_only(self, monkeypatch):
        self.programs = set()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        q, mask = on_a_gpu()
        with pytest.raises(RuntimeError, match="needs a C compiler"):
            sparse._check(q, mask, Precision.parse("int8"), 0.3)
        if DEVICE == "cpu":
            case = layer(1)
            sparse._check(case.q, case.mask, Precision.parse("int8"), 0.3)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [None, "int8", "int8/fp8", ["int8", "bf16", "int8"]], ids=str)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_all_layers_share_one_graph_on_a_gpu(precision, mode):
    def function(case: Case) -> Any:
        return call(case, precision=precision) + 1

    prepare._signs.cache_clear()
    compiled = torch.compile(function, fullgraph=True, mode=mode)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        for seed in [1, 2, 3] * 3:
            case = layer(seed, dtype=torch.bfloat16)
            _ = case.mask.launch_order
            torch.compiler.cudagraph_mark_step_begin()
            got = compiled(case).clone()
            torch.testing.assert_close(got[case.real], function(case)[case.real], atol=1e-2, rtol=1e-2)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["bf16", "int8", "int8/fp8"])
def test_a_cuda_graph_replays_with_changed_inputs(precision):
    case, other = layer(1, dtype=torch.bfloat16), layer(2, dtype=torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(case, precision=precision, return_lse=True)
    torch.cuda.current_stream().wait_stream(stream)
    case.table = case.table.clone()  # never seen before: its values cannot be looked at now
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call(case, precision=precision, return_lse=True)
    for changed in (case, other, other):
        for name in ("q", "k", "v", "order", "valid_text"):
            getattr(case, name).copy_(getattr(changed, name))
        case.mask.bits.copy_(changed.mask.bits)
        out.zero_()
        graph.replay()
        expected, logs = call(changed, precision=precision, return_lse=True)
        assert torch.equal(out[case.real], expected[case.real])
        assert torch.equal(lse.transpose(1, 2)[case.real], logs.transpose(1, 2)[case.real])


@pytest.mark.gpu
def test_a_call_on_a_gpu_never_waits_for_it():
    case = layer(1, dtype=torch.bfloat16)
    for precision in ("int8", ["int8", "bf16", "int8"]):
        call(case, precision=precision)
        torch.cuda.set_sync_debug_mode("error")
        try:
            call(case, precision=precision)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "decibels"), [("bf16", 45), ("int8", 32), ("int8/fp8", 26)])
def test_offsets_beyond_32_bits_are_right(precision, decibels):
    """More than 2³¹ elements in q, k, v, out and in every operand; about 45 GB."""
    heads, dim, size = 40, 128, 128
    tokens = 2**31 // (heads * dim) + 300
    if torch.cuda.mem_get_info()[0] < 50e9:
        pytest.skip("needs 50 GB of GPU memory")
    count, last = blocks_of(tokens, size), tokens - 1
    assert tokens * heads * dim > 2**31
    place = torch.arange(count, device="cuda")
    bits = torch.zeros(heads, count, blocks_of(count, 8), dtype=torch.uint8, device="cuda")
    for kept in (place, count - 1 - place):  # the diagonal and the other one
        byte, bit = kept // 8, (1 << (kept % 8)).to(torch.uint8)
        bits[:, place, byte] |= bit
    mask = BlockMask(bits, count, (size, size))
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, tokens, heads, dim, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(3)
    )
    table = torch.stack([torch.arange(tokens), torch.arange(tokens).flip(0)]).to("cuda", torch.int32)
    order = torch.arange(heads, device="cuda") % 2
    out, lse = paroattn.attention(
        q, k, v, mask, table=table, order=order, precision=precision, return_lse=True, impl="triton"
    )
    assert torch.isfinite(lse).all()
    for head in (0, 1, heads - 2, heads - 1):
        for block in (0, 1, count // 2, count - 2, count - 1):
            index = table[head % 2].long()
            rows = index[block * size : (block + 1) * size]
            keys = torch.cat([index[j * size : (j + 1) * size] for j in sorted({block, count - 1 - block})])
            scores = q[0, rows, head].double() @ k[0, keys, head].double().T / dim**0.5
            expected = scores.softmax(-1) @ v[0, keys, head].double()
            assert sqnr(out[0, rows, head], expected) >= decibels, (head, block)
            torch.testing.assert_close(lse[0, head, rows].double(), scores.logsumexp(-1), atol=2e-2, rtol=0)
    assert out[0, last].isfinite().all()
