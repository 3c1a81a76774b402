"""What every test runs under: no network, few threads, poisoned memory, and Triton's interpreter on a CPU."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, min(4, (os.cpu_count() or 1) // WORKERS)))

SKIPPED = {
    "gpu": (lambda config: not HAS_GPU, "needs an NVIDIA GPU"),
    "slow": (lambda config: not config.getoption("--slow"), "takes long; run with --slow"),
}


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that take long")
    parser.addoption("--diffusers", metavar="VERSION", help="fail at once if another version is imported")


def pytest_configure(config):
    wanted = config.getoption("--diffusers")
    if wanted is None:
        return
    import diffusers  # not earlier: it imports Triton, which must find the variable above

    if diffusers.__version__ != wanted:
        raise pytest.UsageError(f"diffusers must be {wanted}; got {diffusers.__version__} from {diffusers.__file__}")


def pytest_collection_modifyitems(config, items):
    for marker, (applies, reason) in SKIPPED.items():
        if applies(config):
            for item in items:
                if marker in item.keywords:
                    item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Let deterministic mode fill `torch.empty` with NaN, so that a value nobody wrote cannot pass for a zero."""
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.fixture(scope="module")
def one_thread():
    """For models so small that threads mostly wait for each other, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
