"""Writing files so that a reader never meets half of one and nothing of a dead writer stays."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# So many writers of one path may be at work at once and leave something behind if they are killed.
_SLOTS = 8
NO_LOCKS = -1
SCRATCH = ".*.tmp"
"""What scratch folders are called. None of them is ever uploaded or copied."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a path to write to; rename that file to `path` if the block succeeds.

    On any error the new file is removed and an older `path` stays as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with scratch(path) as folder:
        temporary = folder / path.name
        yield temporary
        finish(temporary, folder.stat().st_mode)
        os.replace(temporary, path)


@contextmanager
def scratch(path: str | Path) -> Iterator[Path]:
    """Give an empty folder beside `path`, on its file system, for what is to become `path`.

    The folder goes when the block ends. Those that killed writers of the same path left behind go
    when the block begins: a writer holds a lock on its folder, and the system gives it back when
    the process ends.
    """
    folder, handle = _claimed(Path(os.path.abspath(path)))
    try:
        yield folder
    finally:
        if _is_still(folder, handle):  # once it was renamed the name may be another writer's
            _remove(folder)
        unlock(handle)


def _claimed(path: Path) -> tuple[Path, int]:
    """Make a folder for `path` and lock it; dead writers' folders go on the way."""
    chosen: tuple[Path, int] | None = None
    name = f".{path.name[:200]}."
    for number in range(_SLOTS):
        folder = path.with_name(f"{name}{number}.tmp")
        made = chosen is None and _made(folder)
        if not made and not os.path.lexists(folder):
            continue
        handle = locked(folder)
        if handle is None:  # nothing is there, or a living writer is at work
            continue
        if handle == NO_LOCKS and not made:
            continue  # nobody can tell whether its writer lives
        if chosen is None:
            if not made:
                _empty(folder)
            chosen = folder, handle
        else:
            _remove(folder)
            unlock(handle)
    if chosen is None:
        chosen = Path(tempfile.mkdtemp(dir=path.parent, prefix=name, suffix=".tmp")), NO_LOCKS
    return chosen


def _made(folder: Path) -> bool:
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True


def _is_still(folder: Path, handle: int) -> bool:
    """Tell whether a path leads to the folder that was locked."""
    if handle == NO_LOCKS:
        return True
    try:
        return os.path.samestat(os.fstat(handle), os.stat(folder, follow_symlinks=False))
    except OSError:
        return False


def _remove(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # something is in it, or it has become what it was made for
        shutil.rmtree(folder, ignore_errors=True)


def _empty(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)
        else:
            os.unlink(entry.path)


def locked(folder: Path, wait: bool = False) -> int | None:
    """Lock a folder for this writer, who gives it back with `unlock` or by ending.

    Args:
        folder: nothing is written into it.
        wait: until another writer has ended.

    Returns:
        `NO_LOCKS` where the system or the file system has none; None where the folder is not there
        or another writer has it.
    """
    if sys.platform == "win32":
        return NO_LOCKS if folder.is_dir() else None
    import fcntl

    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(handle), os.stat(folder, follow_symlinks=False)):
            return handle
    except (BlockingIOError, FileNotFoundError):  # held by another, or removed meanwhile
        pass
    except OSError:
        os.close(handle)
        return NO_LOCKS
    os.close(handle)
    return None


def unlock(handle: int | None) -> None:
    """Give a lock back."""
    if handle is not None and handle != NO_LOCKS:
        os.close(handle)


def finish(file: Path, folder_mode: int) -> None:
    """Give a new file the mode that its folder was made with (safetensors writes private files),
    and bring it to the disk before a name points to it."""
    file.chmod(folder_mode & 0o666)
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def write_text(path: str | Path, text: str) -> None:
    """Write a text file through a temporary name."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
