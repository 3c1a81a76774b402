"""CUDA C++ of the package: compiled by NVRTC without a GPU, kept on disk, and started on torch's streams."""

import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy
import pytest
import torch

from paroattn.kernels import native

ARCHES = ("sm_80", "sm_86", "sm_89", "sm_90a")
HEADER = "template <class T> __device__ T added(T x, T y) { return x + y; }\n"
SOURCE = """#include <sums.cuh>
extern "C" __global__ void fill(float* out, int n, float value, const float* more) {
    extern __shared__ float room[];
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    room[ROOM - 1 - threadIdx.x] = value;
    __syncthreads();
    if (i < n) out[i] = added(room[ROOM - 1 - threadIdx.x], more ? more[i] : 0.0f);
}
"""
compiles = pytest.mark.skipif(native.missing() is not None, reason=str(native.missing()))


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A folder with sources of its own, and an empty cache."""
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "sums.cuh").write_text(HEADER)
    (folder / "fill.cu").write_text(SOURCE)
    monkeypatch.setattr(native, "SOURCES", folder)
    monkeypatch.setenv(native.CACHE_VARIABLE, str(tmp_path / "kept"))
    for cached in (native._sources_digest, native._say, native.kernel):
        cached.cache_clear()
    yield folder
    for cached in (native._sources_digest, native._say, native.kernel):
        cached.cache_clear()


def kept(sources):
    return sorted(path for path in (sources.parent / "kept").rglob("*") if path.is_file())


@compiles
@pytest.mark.parametrize("arch", ARCHES)
def test_a_source_and_its_header_compile_without_a_gpu(sources, arch):
    assert native.machine_code("fill.cu", arch, ROOM=128)[:4] == b"\x7fELF"


@compiles
def test_what_was_compiled_is_read_from_the_disk(sources, monkeypatch):
    code = native.machine_code("fill.cu", "sm_80", ROOM=128)
    assert [path.read_bytes() for path in kept(sources)] == [code]
    monkeypatch.setattr(native._core(), "Program", None)
    assert native.machine_code("fill.cu", "sm_80", ROOM=128) == code


@compiles
def test_whatever_the_code_depends_on_is_compiled_anew(sources, monkeypatch):
    native.machine_code("fill.cu", "sm_80", ROOM=128)
    native.machine_code("fill.cu", "sm_86", ROOM=128)
    native.machine_code("fill.cu", "sm_80", ROOM=64)
    (sources / "sums.cuh").write_text(HEADER.replace("x + y", "x * y"))
    native._sources_digest.cache_clear()
    native.machine_code("fill.cu", "sm_80", ROOM=128)
    (sources / "fill.cu").write_text(SOURCE.replace("0.0f", "1.0f"))
    native._sources_digest.cache_clear()
    native.machine_code("fill.cu", "sm_80", ROOM=128)
    monkeypatch.setattr(native, "STANDARD", "c++20")
    native.machine_code("fill.cu", "sm_80", ROOM=128)
    assert len(kept(sources)) == 6


@compiles
def test_a_folder_that_cannot_be_written_is_named_once_and_the_kernel_compiles(sources, monkeypatch):
    (sources.parent / "file").write_text("")
    monkeypatch.setenv(native.CACHE_VARIABLE, str(sources.parent / "file" / "kept"))
    with pytest.warns(UserWarning, match=r"file/kept, which must be writable; got Not a directory\. .* every process"):
        assert native.machine_code("fill.cu", "sm_80", ROOM=128)[:4] == b"\x7fELF"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        native.machine_code("fill.cu", "sm_80", ROOM=128)


@compiles
def test_a_source_that_does_not_compile_says_where(sources):
    (sources / "fill.cu").write_text(SOURCE.replace("int i =", "int j ="))
    with pytest.raises(RuntimeError, match=r"(?s)fill.cu must compile for sm_80; got .*\(7\): error.*Update nvidia"):
        native.machine_code("fill.cu", "sm_80", ROOM=128)
    assert kept(sources) == []


def test_the_cache_lies_where_caches_do(monkeypatch, tmp_path):
    monkeypatch.delenv(native.CACHE_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert native.cache_folder() == tmp_path / "paroattn" / "kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert native.cache_folder() == tmp_path / ".cache" / "paroattn" / "kernels"


@pytest.mark.parametrize(
    ("capability", "arch"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((12, 0), "sm_120a")]
)
def test_a_gpu_gets_code_for_its_own_architecture(capability, arch):
    assert native.architecture(capability) == arch


def test_what_is_missing_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    native.missing.cache_clear()
    try:
        with pytest.raises(RuntimeError, match=r"need cuda.core and NVRTC; got .*pip install 'paroattn\[native\]'"):
            native.machine_code("any.cu", "sm_80")
    finally:
        native.missing.cache_clear()


def test_importing_the_package_loads_no_cuda_core():
    code = "import sys, paroattn, paroattn.kernels.native; print([m for m in sys.modules if m.startswith('cuda.core')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.fixture
def started(monkeypatch):
    """What `launch` asks of cuda.core and of the driver, in order; device 3, stream 77."""
    asked = []
    kernel = SimpleNamespace(handle="handle")
    loaded = SimpleNamespace(get_kernel=lambda name: asked.append(("kernel", name)) or kernel)
    core = SimpleNamespace(
        ObjectCode=SimpleNamespace(from_cubin=lambda code, name: loaded),
        LaunchConfig=lambda **config: config,
        launch=lambda stream, config, what, *given: asked.append((stream.__cuda_stream__(), config, what, given)),
    )

    def set_attribute(attribute, value, *place):
        asked.append((attribute, value, *place))
        return (SimpleNamespace(name="too much") if value > 99999 else 0,)

    driver = SimpleNamespace(
        CUfunction_attribute=SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="shared"),
        CUresult=SimpleNamespace(CUDA_SUCCESS=0),
        CUdevice=lambda index: f"device {index}",
        cuKernelSetAttribute=set_attribute,
    )
    monkeypatch.setattr(native, "_core", lambda: core)
    monkeypatch.setattr(native, "import_module", {"cuda.bindings.driver": driver}.__getitem__)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=77))
    return asked


def test_a_kernel_starts_on_torch_s_stream_with_arguments_of_its_types(started):
    x = torch.arange(4.0)
    native.Kernel(b"", "fill").launch(5, 128, 4096, x, None, 7, True, 0.5, numpy.int64(9))
    _, (stream, config, _, given) = started
    assert (stream, config) == ((0, 77), {"grid": 5, "block": 128, "shmem_size": 4096})
    assert given == (x.data_ptr(), 0, 7, 1, 0.5, 9)
    assert [type(value) for value in given[2:]] == [numpy.int32, numpy.int32, numpy.float32, numpy.int64]
    assert type(given[0]) is type(given[1]) is int


def test_more_shared_memory_is_asked_for_once_for_each_device(started, monkeypatch):
    kernel = native.Kernel(b"", "fill")
    for size in (48 * 1024, 60000, 60000, 50000):
        kernel.launch(1, 32, size)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 4)
    kernel.launch(1, 32, 60000)
    asked = [given for given in started if given[0] == "shared"]
    assert asked == [("shared", 60000, "handle", f"device {index}") for index in (3, 4)]


def test_more_shared_memory_than_there_is_is_named(started):
    with pytest.raises(RuntimeError, match=r"fill needs 100000 bytes of shared memory on GPU 3; got too much"):
        native.Kernel(b"", "fill").launch(1, 32, 100000)


@pytest.mark.gpu
@compiles
def test_a_kernel_runs_in_a_stream_and_in_a_graph(sources):
    kernel = native.kernel("fill.cu", "fill", native.architecture(torch.cuda.get_device_capability()), ROOM=20000)
    assert kernel is native.kernel(
        "fill.cu", "fill", native.architecture(torch.cuda.get_device_capability()), ROOM=20000
    )
    out, more = torch.zeros(300, device="cuda"), torch.arange(300.0, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        kernel.launch(3, 128, 80000, out, 299, 0.5, more)
    stream.synchronize()
    assert out.tolist() == [*(more[:299] + 0.5).tolist(), 0.0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel.launch(3, 128, 80000, out, 300, 2.0, None)
    graph.replay()
    assert (out == 2).all()
