"""Writing folders whole or not at all, reading JSON that may have come from anywhere, and checksums of values."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LARGEST_JSON = 64 * 2**20


def existing_file(path: str | os.PathLike, what: str) -> Path:
    """The path, if a file is there.

    Args:
        path: Of the file.
        what: What it holds, for the message.

    Raises:
        FileNotFoundError: If nothing is there, or a folder.
    """
    found = Path(path)
    if found.is_dir() or not found.exists():
        kind = "which is a folder" if found.is_dir() else "which does not exist"
        raise FileNotFoundError(f"{what} must be a file; got {str(path)!r}, {kind}. Check the path.")
    return found


def read_words(path: str | os.PathLike, what: str) -> str:
    """Read a text file.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no text in UTF-8.
    """
    try:
        return existing_file(path, what).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} must be text in UTF-8; got {str(path)!r}, which is not ({error.reason})") from error


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: If the file is too large, is not JSON or holds something else than an object.
    """
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path} must be at most {LARGEST_JSON} bytes; got {path.stat().st_size}")
    try:
        described = json.loads(path.read_bytes(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(described, dict):
        raise ValueError(f"{path} must hold a JSON object; got {type(described).__name__}")
    return described


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no number")


@contextmanager
def writing_folder(folder: str | os.PathLike, holds: Collection[str]) -> Iterator[Path]:
    """Yield a temporary folder that takes `folder`'s name on success and vanishes on failure.

    Args:
        folder: The folder to write. One that exists is replaced if all it has are names in `holds`.
        holds: Names of the files and folders that are written into it.

    Raises:
        FileExistsError, PermissionError: As `check_writable`, before anything is written.
    """
    final = Path(folder).absolute()
    check_writable(final, holds)
    scratch = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        written, old = scratch / "new", scratch / "old"
        written.mkdir()
        yield written
        if final.exists():
            final.rename(old)
        try:
            written.rename(final)
        except BaseException:
            if old.exists():
                old.rename(final)
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def check_writable(folder: str | os.PathLike, holds: Collection[str]) -> None:
    """Raise before any long work if `folder` cannot be written later.

    Raises:
        FileExistsError: If it exists and has anything but names in `holds`, or a README.md alone.
        PermissionError: If it or its parent cannot be written.
    """
    final = Path(folder).absolute()
    if final.exists() and not final.is_dir():
        raise FileExistsError(f"{final} is a file; give the name of a folder to write")
    found = sorted(path.name for path in final.iterdir()) if final.is_dir() else []
    others = (
        found if found == ["README.md"] else [name for name in found if name not in holds]
    )  # a card of ours has company
    if others:
        raise FileExistsError(f"{final} holds something else ({others[0]}), which would be lost; give another folder")
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".writable.", dir=final.parent):
            pass
    except OSError as error:
        raise PermissionError(f"{final.parent} cannot be written ({error.strerror}); give another folder") from error


def sha256_of(value: Any) -> str:
    """SHA-256 of a value as JSON, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def shortened(digest: Any) -> str:
    """The beginning of a checksum, for messages."""
    return f"{str(digest)[:16]}…"
