"""Loading hostile files in a process that notes what they do: one row a file, and a table.

    python tests/hostile/running.py [--sample N] [--only NAME] [--write]

prints the table of docs/security.md; `--sample 5` takes every fifth file, `--write` puts the table
into the page.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
for _place in ("", "tests", "tests/integration", "tests/hostile", "kernels/torch-ext"):
    sys.path.insert(0, str(ROOT / _place))

import torch  # noqa: E402
from attacks import Attack, attacks_on  # noqa: E402
from whole import LOADERS, build  # noqa: E402

from memwrap.serving.named_states import NoStateError  # noqa: E402

PAGE = ROOT / "docs" / "security.md"
SECONDS, MEGABYTES = 10.0, 400  # of processor time; waiting may take six times as long
OUTCOMES = ("refused", "harmless", "FAILED")
CHANGES = {"os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink",
           "os.truncate", "os.utime"}  # fmt: skip
RAN = "CODE-RAN"  # the file that hostile code would make

_events: list[str] = []
_watched: list[str] = []


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    """What a file must not bring about."""
    if not _watched:
        return
    if event in ("socket.connect", "socket.getaddrinfo", "os.system", "subprocess.Popen",
                 "pickle.find_class"):  # fmt: skip
        _events.append(f"{event} {str(arguments)[:80]}")
    elif event == "open" or event in CHANGES:
        for path in arguments[:2]:
            if isinstance(path, (str, bytes, os.PathLike)) and _is_outside(os.fsdecode(path)):
                _events.append(f"{event} {os.fsdecode(path)}")


def _is_outside(path: str) -> bool:
    """Tell whether a path leads to where nothing may be opened or changed."""
    return f"{os.path.realpath(path)}/".startswith(f"{_watched[0]}/")


class TooLongError(BaseException):
    """Nothing of memwrap catches it."""


def _too_long(*_: Any) -> None:
    raise TooLongError


def outcome(target: str, folder: Path, whole: str) -> tuple[str, str]:
    """`(outcome, what was said)` of loading a folder that should give `whole` or nothing."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 6 * SECONDS)
    try:
        got = LOADERS[target](folder)
        return ("harmless", "") if got == whole else ("FAILED", "was accepted and differs")
    except (ValueError, FileNotFoundError, NoStateError) as error:
        source = traceback.extract_tb(error.__traceback__)[-1].filename
        said = str(error)
        if not Path(source).is_relative_to(ROOT / "memwrap"):
            return "FAILED", f"{type(error).__name__} of {source}: {said[:150]}"
        if not said or len(said) > 900:
            return "FAILED", f"is no clear error: {said[:200]}"
        return "refused", said
    except TooLongError:
        return "FAILED", f"took more than {SECONDS:.0f} s"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return (
            "FAILED",
            f"{type(error).__name__}: {str(error)[:150]} ({last.filename}:{last.lineno})",
        )
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def try_one(target: str, attack: Attack, number: int, places: dict[str, Path], whole: str) -> Any:
    folder = places["scratch"] / f"{target}-{number}"
    shutil.copytree(places["whole"] / target, folder, symlinks=True)
    chance = random.Random(f"{target} {attack.name} {number}")
    try:
        attack.apply(folder, places["other"] / target, places["outside"], chance)
        _events.clear()
        _watched[:] = [str(places["outside"].resolve())]
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            what, said = outcome(target, folder, whole)
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        _watched.clear()
        if _events:
            what, said = "FAILED", f"did {_events[0]}"
        elif (places["outside"] / RAN).exists():
            what, said = "FAILED", "ran code"
        elif more > MEGABYTES:
            what, said = "FAILED", f"allocated {more:.0f} MB"
        return [target, attack.name, what, said, round(time.monotonic() - start, 2)]
    finally:
        _watched.clear()
        shutil.rmtree(folder, ignore_errors=True)


def try_all(target: str, attacks: list[Attack], places: dict[str, Path]) -> list[Any]:
    """Try attacks in children, so that what ends a process is an outcome too."""
    rows: list[Any] = []
    whole = LOADERS[target](places["whole"] / target)
    assert whole == LOADERS[target](places["whole"] / target), "loading twice gives two results"
    assert whole != LOADERS[target](places["other"] / target), "another one gives the same"
    while len(rows) < len(attacks):
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            try:
                _child(target, attacks, len(rows), places, whole, write)
            except BaseException:  # of an attack itself, or memory that is not there
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            rows += [json.loads(line) for line in pipe]
        status = os.waitpid(child, 0)[1]
        if len(rows) < len(attacks):
            attack = attacks[len(rows)]
            rows.append([target, attack.name, "FAILED", f"ended the process ({status})", 0.0])
    return rows


def _child(
    target: str, attacks: list[Attack], first: int, places: dict[str, Path], whole: str, write: int
) -> None:
    limit = _virtual_size() + 2**31
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for alarm in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(alarm, _too_long)
    with os.fdopen(write, "w") as pipe:
        for number in range(first, len(attacks)):
            row = try_one(target, attacks[number], number, places, whole)
            pipe.write(json.dumps(row) + "\n")
            pipe.flush()


def _virtual_size() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def run(sample: int = 1, only: str = "") -> list[Any]:
    """All attacks, or every `sample`th: rows of target, attack, outcome, words, seconds."""
    torch.set_num_threads(1)
    sys.addaudithook(_note)
    rows = []
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as server:
        server.bind(("127.0.0.1", 0))  # what a URL in a file would reach
        server.listen(8)
        server.setblocking(False)
        port = server.getsockname()[1]
        places = {n: Path(scratch) / n for n in ("whole", "other", "outside", "scratch")}
        for place in places.values():
            place.mkdir()
        for seed, name in ((0, "whole"), (1, "other")):
            build(places[name], seed)
        for target in LOADERS:
            if not target.startswith(only):
                continue
            attacks = attacks_on(target, places["whole"] / target, port)
            first = len(rows) % sample
            new = try_all(target, attacks[first::sample], places)
            for row in new:
                if row[2] == "FAILED":
                    print(*row[:4], sep=" | ", file=sys.stderr, flush=True)
            rows += new
        try:
            server.accept()
            rows.append(["(any)", "URL", "FAILED", "somebody connected to the server", 0.0])
        except BlockingIOError:
            pass
    return rows


def table(rows: list[Any]) -> str:
    """The outcomes by kind of file."""
    kinds: dict[str, Counter[str]] = {}
    for target, _, what, *_ in rows:
        kinds.setdefault(target, Counter())[what] += 1
    lines = ["| what is loaded | tried | refused | harmless | failed |", "|---|---|---|---|---|"]
    total: Counter[str] = Counter()
    for target, counts in kinds.items():
        total += counts
        lines.append(_line(f"`{target}`", counts))
    return "\n".join([*lines, _line("all", total)]) + "\n"


def _line(name: str, counts: Counter[str]) -> str:
    return (
        " | ".join([f"| {name}", str(counts.total()), *(str(counts[o]) for o in OUTCOMES)]) + " |"
    )


def put_into_page(name: str, lines: str) -> None:
    """Put a table between its marks in docs/security.md."""
    text = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}:begin -->\n", f"<!-- {name}:end -->"
    head, tail = text.split(begin)[0], text.split(end)[1]
    PAGE.write_text(f"{head}{begin}\n{lines}\n{end}{tail}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sample", type=int, default=1)
    parser.add_argument("--only", default="")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    rows = run(asked.sample, asked.only)
    if asked.json:
        print(json.dumps(rows))
        return
    print(table(rows))
    print(f"longest: {max(row[4] for row in rows)} s")
    if asked.write:
        put_into_page("hostile", table(rows))


if __name__ == "__main__":
    main()
