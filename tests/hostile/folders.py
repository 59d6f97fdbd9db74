"""Two processes that write one folder, and folders that may not be written.

    python tests/hostile/folders.py

What is there afterwards is what one of the writers wrote, whole, and who reads meanwhile gets that
or an error; a folder that cannot be written stays as it was, and the error is the system's own.
"""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for _place in ("", "tests", "tests/hostile", "kernels/torch-ext"):
    sys.path.insert(0, str(ROOT / _place))

import torch  # noqa: E402
from writers import Writer, writers  # noqa: E402

ROUNDS = 6
# Those whose two versions are both written by memwrap, over whatever is there.
CHOSEN = ("state of memorizing", "a server's state", "library", "exact store",
          "model with its base", "model in shards", "model with a store")  # fmt: skip
NOBODY = 65534


def in_child(work: Callable[[], Any]) -> int:
    """Start `work` in a process of its own, which ends with 0, with 13 if it was refused, or 1."""
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        except PermissionError:
            code = 13
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    return child


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def two_at_once(writer: Writer, folder: Path) -> None:
    wanted = []
    for version in (0, 1):
        writer.write(folder, version)
        wanted.append(writer.load(folder))

    def work(version: int) -> None:
        for _ in range(ROUNDS):
            writer.write(folder, version)

    children = [in_child(lambda n=n: work(n)) for n in (0, 1)]  # type: ignore[misc]
    while children:
        child, status = os.waitpid(-1, 0)
        assert status == 0, f"{writer.name}: a writer failed beside another"
        children.remove(child)
        try:
            assert writer.load(folder) in wanted, f"{writer.name} is torn"
        except ValueError:  # files of two saves, met while the other writer moves them: refused
            assert children, f"{writer.name} is torn"
    left = [p for p in folder.rglob("*") if p.name.startswith(".") and p.name != ".lock"]
    assert not left, f"{writer.name} left {left}"


def not_writable(writer: Writer, folder: Path) -> None:
    writer.write(folder, 0)
    places = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
    before = contents(folder)
    for place in places:
        place.chmod(0o555)

    def work() -> None:
        if os.getuid() == 0:  # who may write everywhere
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        writer.write(folder, 1)

    assert ended(in_child(work)) == 13, f"{writer.name} was not refused in words"
    for place in places:
        place.chmod(0o755)
    assert contents(folder) == before, f"{writer.name} changed a folder that it may not write"


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o755)
        chosen = [writer for writer in writers(Path(scratch)) if writer.name in CHOSEN]
        assert len(chosen) == len(CHOSEN)
        for number, writer in enumerate(chosen):
            for check in (two_at_once, not_writable):
                folder = Path(scratch) / f"{check.__name__}-{number}"
                folder.mkdir()
                check(writer, folder)
                print(f"{writer.name}: {check.__name__}", flush=True)


if __name__ == "__main__":
    main()
