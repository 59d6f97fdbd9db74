"""Writing several files of a folder so that they change all at once.

What is new is written into a scratch folder inside. One rename makes it the folder `.saved`: from
then on the save counts. Its files are then moved to their places, one after the other. Whoever
meets `.saved` later (its writer was stopped while it moved) moves the rest before anything is read.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from memwrap.io.atomic_files import finish, locked, scratch, unlock
from memwrap.io.reading import inside, read_json

SAVED = ".saved"
_GONE, _OLD = ".gone.json", ".old"  # inside it: names that go, and folders that were replaced


@contextmanager
def rewriting(folder: str | Path, replaces: Sequence[str] = ()) -> Iterator[Path]:
    """Give an empty folder; what the block puts into it takes the places of the files and folders
    of the same names in `folder`, all at once. On any error `folder` stays as it was.

    Args:
        folder: made if it is not there; what else it holds stays.
        replaces: patterns; files of such names that are not written anew go.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with scratch(folder / "saving") as new:
        yield new
        _finish_all(new)
        with _alone(folder):
            _complete(folder)
            old = {path.name for pattern in replaces for path in folder.glob(pattern)}
            gone = sorted(old - {path.name for path in new.iterdir()})
            (new / _GONE).write_text(json.dumps(gone), encoding="utf-8")
            finish(new / _GONE, new.stat().st_mode)
            os.replace(new, folder / SAVED)
            sync(folder)
            _complete(folder)


@contextmanager
def making(folder: str | Path) -> Iterator[Path]:
    """Give an empty folder that becomes `folder`, which must be new or empty, if the block
    succeeds.

    Raises:
        ValueError: if `folder` holds files.
    """
    folder = Path(os.path.abspath(folder))
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; give a new folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with scratch(folder) as place:
        new = place / folder.name
        new.mkdir()
        yield new
        _finish_all(new)
        try:
            if os.name == "nt" and folder.exists():
                folder.rmdir()
            os.replace(new, folder)  # takes the place of an empty folder
        except OSError as error:
            raise ValueError(f"{folder} is not empty any more; give a new folder.") from error


def settle(folder: Path) -> None:
    """Complete a save into `folder` that was stopped while its files were put into place.

    Raises:
        ValueError: if it cannot be completed here.
    """
    if not _is_folder(folder / SAVED):
        return
    try:
        with _alone(folder):
            _complete(folder)
    except OSError as error:
        raise ValueError(
            f"{folder} holds a save that was stopped and cannot be completed ({error.strerror}); "
            "load it once where it can be written."
        ) from error


def sync(folder: Path) -> None:
    """Bring a folder's names to the disk."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder while names in it change; others wait."""
    handle = locked(folder, wait=True)
    try:
        yield
    finally:
        unlock(handle)


def _complete(folder: Path) -> None:
    """Move what a finished save left in `.saved`. However often it is stopped, it goes on."""
    saved = folder / SAVED
    if not _is_folder(saved):
        return
    for entry in sorted(saved.iterdir()):
        if entry.name in (_GONE, _OLD):
            continue
        target = folder / entry.name
        if _is_folder(target):
            if not _is_folder(saved / _OLD):  # somebody else's link to a folder would pass for one
                (saved / _OLD).mkdir()
            os.replace(target, saved / _OLD / entry.name)
        os.replace(entry, target)
    if inside(saved, _GONE).is_file():
        names = read_json(saved / _GONE)
        for name in names if isinstance(names, list) else []:
            if isinstance(name, str) and Path(name).name == name and not _is_folder(folder / name):
                (folder / name).unlink(missing_ok=True)
    shutil.rmtree(saved)


def _is_folder(path: Path) -> bool:
    """Tell whether it is a folder itself and no link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def _finish_all(folder: Path) -> None:
    mode = folder.stat().st_mode
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            finish(path, mode)
