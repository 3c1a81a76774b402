"""The package's shape: which room may import which, what importing it loads, and what no file may contain."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import paroattn

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "paroattn"
ROOMS = ("nouns", "capture", "plan", "kernels", "integration", "evaluation", "demo", "cli")
NOUNS = ("grid", "block_mask", "precision", "phases", "files")
HEAVY = ("triton", "diffusers", "torchmetrics", "transformers", "torch")
MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")

FOLDERS = ("src", "tests", "training", "benchmarks", "docs", ".ci", ".github")
TEXT = ("", ".py", ".md", ".toml", ".txt", ".json", ".html", ".yml", ".cff")
SWORN_OFF = {
    "a path of one machine": r"(?<![\w.~])/(home|root|tmp|Users)/",
    "a debugger": r"\bbreak" + r"point\(|\bi?pdb\b",
    "a block pointer, which Triton removed": r"\bmake_block" + r"_ptr\b|\btl\.advance\b",
}


def room_of(name: str) -> str | None:
    """The room of a top-level module of the package, or None if it is no module of it."""
    name = "nouns" if name in NOUNS else name
    return name if name in ROOMS else None


def imported(source: str, module: Path) -> list[tuple[str, ...]]:
    """Paths below the package of everything that a module imports from it; () is the package itself."""
    package = module.parent.parts
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            absolute = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            up = len(package) + 1 - node.level
            base = ("paroattn", *package)[: up + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            absolute = [(*base, alias.name) for alias in node.names]
        else:
            continue
        found += [path[1:] for path in absolute if path[0] == "paroattn"]
    return found


def violations(source: str, module: Path) -> list[str]:
    """What a module imports from a room to its right, or from the package itself."""
    own = room_of(module.with_suffix("").parts[0])
    assert own, f"{module} must belong to a room: {', '.join(ROOMS)}; nouns are {', '.join(NOUNS)}"
    wrong = []
    for path in imported(source, module):
        room = room_of(path[0]) if path else None
        if path != ("__version__",) and (room is None or ROOMS.index(room) > ROOMS.index(own)):
            wrong.append(f"{module} ({own}) imports paroattn.{'.'.join(path)} ({room or 'the package itself'})")
    return wrong


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_a_room_imports_only_from_its_left(module):
    assert violations((PACKAGE / module).read_text(), module) == []


@pytest.mark.parametrize(
    "source",
    [
        "from ..integration import apply",
        "from .. import integration",
        "from ..cli import main",
        "from ..integration.apply import apply",
        "import paroattn.evaluation.report",
        "from paroattn import demo",
        "from paroattn.demo.prompt import SCENES",
        "def later():\n    from ..demo import pipeline",
        "if TYPE_CHECKING:\n    from ..integration.models import ModelSpec",
        "import paroattn",
        "from paroattn import apply",
        "from .. import Plan, __version__",
        "from .. import *",
    ],
)
def test_the_check_of_imports_sees_every_way_to_the_right(source):
    assert len(violations(source, Path("kernels/sparse.py"))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "from . import reference",
        "from .reference import reference_attention",
        "from .. import __version__, grid",
        "from ..plan.plan import Plan",
        "from paroattn.block_mask import BlockMask",
        "import torch, paroattn_other, demo",
        "from integration import apply",
    ],
)
def test_the_check_of_imports_lets_pass_what_is_allowed(source):
    assert violations(source, Path("kernels/sparse.py")) == []


def test_the_check_of_imports_knows_where_a_dot_starts():
    assert imported("from .sparse import run", Path("kernels/__init__.py")) == [("kernels", "sparse", "run")]
    assert imported("from .grid import Grid", Path("capture.py")) == [("grid", "Grid")]


def test_no_file_is_a_drawer_for_everything():
    assert [str(path) for path in MODULES if path.stem in ("utils", "common", "misc", "helpers")] == []


def test_importing_the_package_loads_nothing_heavy():
    assert run(f"import sys, paroattn; print([name for name in {HEAVY} if name in sys.modules])") == "[]"


@pytest.mark.parametrize("words", [["plan", "--help"], ["plan"], ["paint"]], ids=str)
def test_help_and_wrong_words_come_before_anything_heavy_is_loaded(words):
    code = (
        f"import contextlib, sys, paroattn.cli\nwith contextlib.suppress(SystemExit):\n    paroattn.cli.main({words})\n"
    )
    assert run(f"{code}print([name for name in {HEAVY} if name in sys.modules])").splitlines()[-1] == "[]"


def test_the_check_of_heavy_imports_can_fail():
    assert run(f"import sys, paroattn; paroattn.Grid; print([n for n in {HEAVY} if n in sys.modules])") == "['torch']"


def test_the_public_names_are_few_and_all_there():
    assert len(paroattn.__all__) <= 10
    assert dir(paroattn) == sorted(paroattn.__all__)
    for name in paroattn.__all__:
        assert getattr(paroattn, name) is not None


def test_an_unknown_name_is_an_attribute_error_that_says_which():
    with pytest.raises(AttributeError, match="module 'paroattn' has no attribute 'applied'"):
        _ = paroattn.applied


def test_memory_that_nobody_wrote_is_poisoned_during_tests():
    assert torch.empty(1000).isnan().all()


def test_the_page_on_architecture_names_every_file_of_every_room_once():
    lines = re.findall(r"^\| ?(\w*) \| (`.*?`) \|", (ROOT / "docs" / "architecture.md").read_text(), re.MULTILINE)
    named, room = [], ""
    for name, files in lines:
        room = name or room
        folder = "" if room == "nouns" else room
        named += [Path(folder, file) for file in re.findall(r"`([^`]+)`", files)]
    assert sorted(path for path in named if path.suffix) == sorted(path for path in MODULES if path.stem[0] != "_")
    assert all((PACKAGE / path).exists() for path in named)


@pytest.mark.parametrize("what", SWORN_OFF)
def test_no_file_contains(what):
    files = [path for path in ROOT.iterdir() if path.is_file()]
    files += [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    pattern = re.compile(SWORN_OFF[what])
    hits = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in files
        if path.suffix in TEXT and path != Path(__file__)
        for number, line in enumerate(path.read_text(errors="ignore").splitlines(), 1)
        if pattern.search(line)
    ]
    assert hits == []
