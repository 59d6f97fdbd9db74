"""Writers that are killed at random moments: what is there afterwards is the old or the new, whole.

    python tests/hostile/kills.py [--kills N] [--write]

prints the table of docs/security.md; `--write` puts it into the page. Checkpoints of a training are
killed in `tests/integration/test_killed.py`.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for _place in ("", "tests", "tests/hostile", "kernels/torch-ext"):
    sys.path.insert(0, str(ROOT / _place))

import torch  # noqa: E402
from whole import ids, llama, model_of, of_library, of_model, of_state, of_store, trained  # noqa: E402

import memwrap  # noqa: E402
from memwrap import exporting  # noqa: E402
from memwrap.retrieval.library import Library  # noqa: E402
from memwrap.stores import FaissStore, open_store  # noqa: E402

PAGE = ROOT / "docs" / "security.md"


@dataclass(frozen=True)
class Writer:
    """A way to write one of two versions over the other, and what loading gives."""

    name: str
    write: Callable[[Path, int], None]
    load: Callable[[Path], str]


def library(seed: int) -> Library:
    texts = {f"doc{n}": ids(30 + n, seed + n)[0] for n in range(3)}
    return Library.encode(model_of("extended_mind"), texts)


def writers() -> list[Writer]:
    with torch.no_grad():
        states = [model_of("memorizing").read(ids(29, seed)) for seed in (0, 1)]
    models = [trained(seed, "armt", num_memory_tokens=2, d_mem=8) for seed in (0, 1)]
    searching = [trained(seed, "knnlm") for seed in (0, 1)]
    for seed, model in enumerate(searching):
        store = FaissStore(32)
        store.add(torch.randn(50 + seed, 32), values=torch.arange(50 + seed))
        store.build()
        model.memories["knnlm"].attach(store)
    libraries = [library(0), library(50)]
    model_for_states = model_of("memorizing")
    return [
        Writer(
            "state", lambda folder, n: states[n].save(folder / "s.safetensors"),
            lambda folder: of_state(
                memwrap.MemoryState.load(folder / "s.safetensors", model_for_states),
                model_for_states,
            ),
        ),
        Writer(
            "model with its base",
            lambda folder, n: models[n].save_pretrained(folder / "m", include_base=True),
            lambda folder: of_model(memwrap.load(folder / "m")),
        ),
        Writer(
            "model with a store", lambda folder, n: searching[n].save_pretrained(folder / "m"),
            lambda folder: of_model(memwrap.load(folder / "m", llama())),
        ),
        Writer(
            "library", lambda folder, n: libraries[n].save(folder / "l"),
            lambda folder: of_library(Library.load(folder / "l", model_of("extended_mind"))),
        ),
    ]  # fmt: skip


class Kills:
    """Kills processes that write, and counts what they left.

    Attributes:
        rows: name, kills, one version there, the other, torn.
    """

    def __init__(self, kills: int, seed: int = 0) -> None:
        self.kills, self.chance, self.rows = kills, random.Random(seed), []  # type: ignore[var-annotated]

    def killed(self, work: Callable[[], Any], longest: float) -> bool:
        """Run `work` in a child and kill it at some moment; whether it was at work still."""
        read, write = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.close(read)
                os.write(write, b"x")
                work()
            finally:
                os._exit(0)
        os.close(write)
        os.read(read, 1)
        os.close(read)
        time.sleep(self.chance.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        return os.waitpid(child, 0)[1] == signal.SIGKILL

    def run(self, writer: Writer, scratch: Path) -> None:
        folder = scratch / "folder"
        wanted = []
        for version in (1, 0):
            folder.mkdir(exist_ok=True)
            start = time.monotonic()
            writer.write(folder, version)
            longest = time.monotonic() - start
            wanted.insert(0, writer.load(folder))
        assert wanted[0] != wanted[1]
        count, found, torn = 0, [0, 0], 0

        def work() -> None:
            while True:
                for version in (1, 0):
                    writer.write(folder, version)

        while count < self.kills:
            assert self.killed(work, 0.05 + 4 * longest)
            count += 1
            try:
                found[wanted.index(writer.load(folder))] += 1
            except Exception as error:
                print(f"{writer.name}: {type(error).__name__}: {error}")
                torn += 1
                writer.write(folder, 0)
        writer.write(folder, 0)
        left = [p for p in folder.rglob("*") if p.name.startswith(".") and p.name != ".lock"]
        assert not left, f"{writer.name} left {left}"
        self.rows.append((writer.name, count, *found, torn))
        shutil.rmtree(folder)

    def run_store(self, scratch: Path) -> None:
        """Entries that are added one batch after the other: each is there or not, and in order."""
        folder, count, torn, more = scratch / "store", 0, 0, 0
        generator = torch.Generator().manual_seed(0)
        vectors = torch.randn(5000, 4, generator=generator)

        def work() -> None:
            store = FaissStore(4, path=folder, shard_size=10, dtype="float32")
            first = (store.cursor or {"next": 0})["next"]
            for at in range(first, 5000, 10):
                numbers = torch.arange(at, at + 10)
                store.add(vectors[numbers], values=numbers, cursor={"next": at + 10})
                if at % 50 == 0:
                    store.build()

        before = 0
        while count < self.kills:
            if not self.killed(work, 0.4):
                break
            count += 1
            if not (folder / "store.json").is_file():
                continue
            try:
                store: Any = open_store(folder)
                of_store(store)
                known = (store.cursor or {"next": 0})["next"]
                values = store.entries(torch.arange(known)).values
                good = len(store) == known >= before and values.tolist() == list(range(known))
                good = good and torch.equal(store.vectors(range(known)), vectors[:known])
            except Exception as error:
                print(f"store: {type(error).__name__}: {error}")
                good = False
            torn += not good
            more += known > before
            before = known
        self.rows.append(
            ("store, entries added (no more of them, more)", count, count - more - torn, more, torn)
        )

    def run_export(self, scratch: Path) -> None:
        """Into a new folder each time: it is not there, or whole."""
        model, found, torn, count = trained(0, num_memory_tokens=2), [0, 0], 0, 0
        start = time.monotonic()
        exporting.export(model, scratch / "first", check=False)
        longest = time.monotonic() - start
        wanted = of_model(memwrap.load(scratch / "first"))
        while count < self.kills:
            folder = scratch / f"export-{count}"
            if count % 2:
                folder.mkdir()  # an empty one is replaced
            if not self.killed(
                lambda f=folder: exporting.export(model, f, check=False),  # type: ignore[misc]
                3 * longest,
            ):
                shutil.rmtree(folder)
                continue
            count += 1
            there = folder.is_dir() and any(folder.iterdir())
            if there and of_model(memwrap.load(folder)) != wanted:
                torn += 1
            else:
                found[there] += 1
        self.rows.append(("export (nothing, whole)", count, *found, torn))


def run(kills: int, names: str = "") -> list[Any]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    result = Kills(kills)
    with tempfile.TemporaryDirectory() as scratch:
        for writer in writers():
            if names in writer.name:
                result.run(writer, Path(scratch))
        if names in "store":
            result.run_store(Path(scratch))
        if names in "export":
            result.run_export(Path(scratch))
    return result.rows


def table(rows: list[Any]) -> str:
    lines = ["| what was written | kills | one version is there | the other | torn |",
             "|---|---|---|---|---|"]  # fmt: skip
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    rows = run(asked.kills)
    print(table(rows))
    if asked.write:
        text = PAGE.read_text(encoding="utf-8")
        begin, end = "<!-- kills:begin -->\n", "<!-- kills:end -->"
        head, tail = text.split(begin)[0], text.split(end)[1]
        PAGE.write_text(f"{head}{begin}\n{table(rows)}\n{end}{tail}", encoding="utf-8")
    sys.exit(any(row[4] for row in rows))


if __name__ == "__main__":
    main()
