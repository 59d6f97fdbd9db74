"""Writers whose disk is full: what was there is there, and a retry succeeds.

    python tests/hostile/faults.py [--sample N] [--only NAME] [--write]

In front of every call that changes files (`--sample 5`: every fifth), one after the other, the
system says that the disk is full, and the caller is told. What is there afterwards is the older or
the newer version; the same process then writes again, and the newer one is there, with nothing
left beside it. Prints the table of docs/security.md; `--write` puts it into the page.
"""

from __future__ import annotations

import argparse
import errno
import gc
import os
import shutil
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for _place in ("", "tests", "tests/integration", "tests/hostile", "kernels/torch-ext"):
    sys.path.insert(0, str(ROOT / _place))

import torch  # noqa: E402
from kills import WRITES  # noqa: E402
from running import CHANGES, put_into_page  # noqa: E402
from writers import Writer, writers  # noqa: E402


class Disk:
    """A disk that fails in front of one call that changes files in a folder.

    Attributes:
        calls: made since `root` was set.
        last: number of the call that fails; 0 for none.
    """

    def __init__(self) -> None:
        self.root, self.calls, self.last = "", 0, 0
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.root or (event != "open" and event not in CHANGES):
            return
        path = arguments[0]
        if event == "open" and not arguments[2] & WRITES:
            return
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.root):
            self.calls += 1
            if self.calls == self.last:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(path))

    def fails_in(self, writer: Writer, folder: Path, last: int) -> bool:
        """Write the newer version with a call that fails; whether the caller was told."""
        self.root, self.calls, self.last = str(folder.resolve()), 0, last
        try:
            writer.write(folder, 1)
        except (OSError, ValueError):
            return True
        finally:
            self.root = ""
        return False


def try_writer(writer: Writer, folder: Path, disk: Disk, sample: int) -> list[Any]:
    """One row: name, calls that failed, told, older there, newer there, wrong."""
    wanted = []
    for version in (0, 1):
        writer.write(folder, version)
        wanted.append(writer.load(folder))
    shutil.rmtree(folder)
    folder.mkdir()
    writer.write(folder, 0)
    disk.fails_in(writer, folder, 0)
    told = wrong = 0
    found = [0, 0]
    numbers = range(1, disk.calls + 1, sample)
    for number in numbers:
        shutil.rmtree(folder)
        folder.mkdir()
        writer.write(folder, 0)
        told += disk.fails_in(writer, folder, number)
        gc.collect()  # a store in the error's frames holds its folder
        try:
            version = wanted.index(writer.load(folder))
            found[version] += 1
            if version == 0 or writer.again:
                writer.write(folder, 1)
            left = [p for p in folder.rglob(".*") if p.name != ".lock"]
            if writer.load(folder) != wanted[1] or left:
                raise ValueError(f"the retry gives something else, or left {left}")
        except Exception as error:
            print(f"{writer.name}, {number}: {type(error).__name__}: {error}", file=sys.stderr)
            wrong += 1
    return [writer.name, len(numbers), told, *found, wrong]


def run(sample: int = 1, only: str = "") -> list[Any]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rows, disk = [], Disk()
    with tempfile.TemporaryDirectory() as scratch:
        for number, writer in enumerate(writers(Path(scratch))):
            if only in writer.name:
                folder = Path(scratch) / str(number)
                folder.mkdir()
                rows.append(try_writer(writer, folder, disk, sample))
                print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
    return rows


def table(rows: list[Any]) -> str:
    lines = ["| what was written | failed at a call | the caller was told | the older is there | "
             "the newer | wrong |", "|---|---|---|---|---|---|"]  # fmt: skip
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sample", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    rows = run(asked.sample, asked.only)
    print(table(rows))
    if asked.write:
        put_into_page("faults", table(rows))
    sys.exit(any(row[-1] for row in rows))


if __name__ == "__main__":
    main()
