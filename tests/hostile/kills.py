"""Writers that are killed: what is there afterwards is the old or the new, whole.

    python tests/hostile/kills.py [--kills N] [--random M] [--only NAME] [--write]

Each is killed with SIGKILL in front of every call that changes files, one after the other
(`--kills N`: of N of them, evenly spread), so that kills fall before, inside and behind the moment
at which a save counts; and at random moments, which may be in the middle of a call. Prints the
table of docs/security.md; `--write` puts it into the page.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for _place in ("", "tests", "tests/integration", "tests/hostile", "kernels/torch-ext"):
    sys.path.insert(0, str(ROOT / _place))

import test_killed  # noqa: E402
import torch  # noqa: E402
from running import CHANGES, put_into_page  # noqa: E402
from writers import Writer, writers  # noqa: E402

from memwrap.training.resuming import last_checkpoint  # noqa: E402

RANDOM = 20  # kills at random moments
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def in_child(work: Callable[[], Any]) -> int:
    """Start `work` in a process of its own; its id, once it has begun."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        code = 1
        try:
            os.close(read)
            os.write(write, b"x")
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        finally:
            os._exit(code)
    os.close(write)
    os.read(read, 1)
    os.close(read)
    return child


def killed_in(work: Callable[[], Any], seconds: float) -> bool:
    """Kill `work` after some time; whether it was at work still."""
    child = in_child(work)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1] == signal.SIGKILL


def calls_of(work: Callable[[], Any], folder: Path, last: int = 0) -> int:
    """Run `work` in a process that is killed in front of its file-system call number `last` in
    `folder` (0: it comes to its end).

    Returns:
        The calls that it made; -1 if it was killed.
    """
    read, write = os.pipe()
    root = str(folder.resolve())

    def counted() -> None:
        count = 0

        def note(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event != "open" and event not in CHANGES:
                return
            path = arguments[0]
            if event == "open" and not arguments[2] & WRITES:
                return
            if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(root):
                count += 1
                if count == last:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(note)
        work()
        os.write(write, str(count).encode())

    child = in_child(counted)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    if status == signal.SIGKILL:
        return -1
    assert status == 0, "a writer failed"
    return int(said)


def spread(calls: int, kills: int) -> list[int]:
    """Numbers of calls, all or `kills` of them evenly, the first and last among them."""
    if not kills or kills >= calls:
        return list(range(1, calls + 1))
    return sorted({round(1 + n * (calls - 1) / max(kills - 1, 1)) for n in range(kills)})


class Kills:
    """Kills processes that write, and counts what they left.

    Args:
        kills: at calls; 0 for all of them.
        by_chance: at random moments.

    Attributes:
        rows: name, kills at calls, at random moments, one version there, the other, torn.
    """

    def __init__(self, kills: int, by_chance: int, seed: int = 0) -> None:
        self.kills, self.by_chance = kills, by_chance
        self.chance = random.Random(seed)
        self.rows: list[Any] = []

    def run(self, writer: Writer, folder: Path) -> None:
        wanted, longest = self._versions(writer, folder)
        found, torn = [0, 0], 0

        def begin() -> None:
            """Without what a dead writer left, which the next one would remove first."""
            shutil.rmtree(folder)
            folder.mkdir()
            writer.write(folder, 0)

        def look() -> None:
            nonlocal torn
            try:
                found[wanted.index(writer.load(folder))] += 1
            except Exception as error:
                print(f"{writer.name}: {type(error).__name__}: {error}", file=sys.stderr)
                torn += 1

        begin()
        calls = calls_of(lambda: writer.write(folder, 1), folder)
        assert calls, f"{writer.name} makes no calls"
        places = spread(calls, self.kills)
        for number in places:
            begin()
            assert calls_of(lambda: writer.write(folder, 1), folder, number) == -1
            look()

        def work() -> None:
            writer.write(folder, 1)
            time.sleep(60)

        for _ in range(self.by_chance):
            writer.write(folder, 0)
            assert killed_in(work, self.chance.uniform(0, 1.2 * longest))
            look()
        writer.write(folder, 0)  # over what dead ones left
        writer.write(folder, 1)
        left = [p for p in folder.rglob("*") if p.name.startswith(".") and p.name != ".lock"]
        assert not left, f"{writer.name} left {left}"
        name = writer.name + f" ({writer.versions})" * bool(writer.versions)
        self.rows.append([name, len(places), self.by_chance, *found, torn])

    def _versions(self, writer: Writer, folder: Path) -> tuple[list[str], float]:
        wanted = []
        for version in (0, 1):
            start = time.monotonic()
            writer.write(folder, version)
            longest = time.monotonic() - start
            wanted.append(writer.load(folder))
        assert wanted[0] != wanted[1]
        return wanted, longest

    def run_training(self, folder: Path) -> None:
        """Checkpoints: from what a kill left a training goes on to the losses of one that was not
        killed."""

        def losses(name: str) -> list[float]:
            return json.loads((folder / name / "losses.json").read_text())

        def train(name: str) -> None:
            with quiet():
                test_killed.train(folder / name)

        calls = calls_of(lambda: train("straight"), folder / "straight" / "run")
        places = spread(calls, self.kills or 2 * RANDOM)
        torn = fresh = resumed = 0
        for number in [*places, *[0] * self.by_chance]:
            shutil.rmtree(folder / "killed", ignore_errors=True)
            if number:
                calls_of(lambda: train("killed"), folder / "killed" / "run", number)
            else:
                killed_in(lambda: train("killed"), self.chance.uniform(0.05, 1.0))
            newest = last_checkpoint(folder / "killed" / "run")
            calls_of(lambda: train("killed"), folder)
            torn += losses("killed") != losses("straight")
            resumed += newest is not None
            fresh += newest is None
        name = "checkpoint of a training (begun anew, gone on)"
        self.rows.append([name, len(places), self.by_chance, fresh, resumed, torn])


@contextmanager
def quiet() -> Iterator[None]:
    with open(os.devnull, "w") as nowhere:
        before, sys.stdout = sys.stdout, nowhere
        try:
            yield
        finally:
            sys.stdout = before


def run(kills: int, by_chance: int, only: str = "") -> list[Any]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result = Kills(kills, by_chance)
    with tempfile.TemporaryDirectory() as scratch:
        for number, writer in enumerate(writers(Path(scratch))):
            if only in writer.name:
                folder = Path(scratch) / str(number)
                folder.mkdir()
                result.run(writer, folder)
                print(*result.rows[-1], sep=" | ", file=sys.stderr, flush=True)
        if only in "training":
            (Path(scratch) / "training").mkdir()
            result.run_training(Path(scratch) / "training")
    return result.rows


def table(rows: list[Any]) -> str:
    lines = ["| what was written | killed at a call | at random | the older is there | the newer "
             "| torn |", "|---|---|---|---|---|---|"]  # fmt: skip
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--random", type=int, default=RANDOM)
    parser.add_argument("--only", default="")
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    rows = run(asked.kills, asked.random, asked.only)
    print(table(rows))
    if asked.write:
        put_into_page("kills", table(rows))
    sys.exit(any(row[-1] for row in rows))


if __name__ == "__main__":
    main()
