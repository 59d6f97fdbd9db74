"""States under names: in memory while they are used, in files where a folder is given."""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from pathlib import Path
from threading import RLock
from typing import Any

from memwrap.io.reading import inside
from memwrap.state.memory_state import MemoryState

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class NoStateError(KeyError):
    """There is no state of a name."""

    def __init__(self, name: str) -> None:
        super().__init__(f"There is no state {name!r}.")


class NamedStates:
    """States by name. The least recently used go to files where all take more than `most_bytes`.

    Args:
        model: the memwrap model that they belong to.
        folder: where files are written; None keeps all in memory.
        most_bytes: of the states that are held in memory.
        save_all: write every state to its file at once, so that other servers of the folder see it.

    Raises:
        ValueError: for `save_all` without a folder.
    """

    def __init__(
        self, model: Any, folder: str | Path | None, most_bytes: int, save_all: bool = False
    ) -> None:
        self.model, self.most_bytes, self.save_all = model, most_bytes, save_all
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        elif save_all:
            self.check_folder()
        self._held: OrderedDict[str, MemoryState] = OrderedDict()
        self._saved: dict[str, int] = {}  # when the file was written that a held state equals
        self._versions: dict[str, int] = {}
        self._count = itertools.count()
        self._lock = RLock()

    def names(self) -> list[str]:
        """List all names, of states in memory and in files."""
        paths = [] if self.folder is None else self.folder.glob("*.safetensors")
        files = [path.stem for path in paths if path.is_file()]
        with self._lock:
            return sorted({*self._held, *(name for name in files if _NAME.fullmatch(name))})

    def __contains__(self, name: str) -> bool:
        path = self._path(name)
        return name in self._held or (path is not None and path.is_file())

    def get(self, name: str) -> tuple[MemoryState, str]:
        """Give a state, from its file if it is not in memory or another server wrote it since, and
        a key that is this state's alone.

        Raises:
            NoStateError: if there is none of this name.
            ValueError: for a file that is damaged or of another model.
        """
        path = self._path(name)
        with self._lock:
            state = self._held.get(name)
            written = path.stat().st_mtime_ns if path is not None and path.is_file() else None
            if state is None or (name in self._saved and written not in (None, self._saved[name])):
                if written is None:
                    raise NoStateError(name)
                file = inside(path.parent, path.name)  # type: ignore[union-attr]
                state = MemoryState.load(file, self.model)
                self._saved[name] = written
                self._versions[name] = next(self._count)
            self._hold(name, state)
            return state, f"{name}#{self._versions[name]}"

    def put(self, name: str, state: MemoryState) -> None:
        """Keep a state in memory, instead of an older one of its name."""
        self._path(name)
        with self._lock:
            self._saved.pop(name, None)
            self._versions[name] = next(self._count)
            self._hold(name, state)
            if self.save_all:
                self.save(name)

    def save(self, name: str) -> Path:
        """Write a state to its file.

        Raises:
            NoStateError: if there is none of this name.
            ValueError: if the server has no folder.
        """
        with self._lock:
            state, path = self.get(name)[0], self._path(name)
            self.check_folder()
            if name not in self._saved:
                state.save(path)  # type: ignore[arg-type]
                self._saved[name] = path.stat().st_mtime_ns  # type: ignore[union-attr]
            return path  # type: ignore[return-value]

    def check_folder(self) -> None:
        """Refuse to save where there is no folder.

        Raises:
            ValueError: says how to give one.
        """
        if self.folder is None:
            raise ValueError("The server has no folder for states (--states FOLDER).")

    def is_saved(self, name: str) -> bool:
        """Tell whether the state equals its file."""
        return name not in self._held or name in self._saved

    def delete(self, name: str) -> None:
        """Forget a state, and delete its file.

        Raises:
            NoStateError: if there is none of this name.
        """
        with self._lock:
            if name not in self:
                raise NoStateError(name)
            self._held.pop(name, None)
            self._saved.pop(name, None)
            path = self._path(name)
            if path is not None:
                path.unlink(missing_ok=True)

    def _path(self, name: str) -> Path | None:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"{name[:100]!r} is no name for a state: letters, digits, '.', '_', '-', at most "
                "100, the first of them a letter or digit."
            )
        return None if self.folder is None else self.folder / f"{name}.safetensors"

    def _hold(self, name: str, state: MemoryState) -> None:
        self._held[name] = state
        self._held.move_to_end(name)
        while self.folder is not None and len(self._held) > 1:
            if sum(s.nbytes for s in self._held.values()) <= self.most_bytes:
                break
            oldest = next(iter(self._held))
            if oldest not in self._saved:
                path = self._path(oldest)
                self._held[oldest].save(path)  # type: ignore[arg-type]
            del self._held[oldest]
            self._saved.pop(oldest, None)


__all__ = ["NamedStates", "NoStateError"]
