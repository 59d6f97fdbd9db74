"""Hostile files: what somebody else's folder may hold. Deterministic by name and number."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from damages import (
    Damage,
    archive,
    cut,
    empty,
    flipped,
    garbage,
    git_pointer,
    head_of,
    numpy_file,
    other_tensors,
    torch_file,
    web_page,
    with_head,
    zeroed,
)

Apply = Callable[[Path, Path, Path, random.Random], None]


@dataclass(frozen=True)
class Attack:
    """A change of a whole folder.

    Attributes:
        name: what is done to which file.
        apply: called with the folder, another whole one of the same kind, a folder elsewhere in
            which nothing may be opened, and a source of chance.
    """

    name: str
    apply: Apply


class Marker:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


# Bytes of any file


def flipped_in_head(data: bytes, chance: random.Random) -> bytes:
    new = bytearray(data)
    new[chance.randrange(min(len(new), 400))] ^= 1 << chance.randrange(8)
    return bytes(new)


def longer(data: bytes, chance: random.Random) -> bytes:
    return data + chance.randbytes(chance.randrange(1, 40))


def utf16(data: bytes, chance: random.Random) -> bytes:
    return data.decode("latin-1").encode("utf-16")


BYTES: tuple[Damage, ...] = (
    cut, cut, flipped, flipped, flipped_in_head, flipped_in_head, zeroed, longer, garbage, empty,
    archive, torch_file, numpy_file, other_tensors, web_page, git_pointer, utf16,
)  # fmt: skip

# Heads of safetensors files


def on_head(edit: Callable[[dict[str, Any], random.Random], Any]) -> Damage:
    def change(data: bytes, chance: random.Random) -> bytes:
        head, rest = head_of(data)
        edited = edit(head, chance)
        return with_head(head if edited is None else edited, rest)

    return change


def _some(head: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    return head[chance.choice(sorted(n for n in head if n != "__metadata__"))]


def _shape(head: dict[str, Any], chance: random.Random) -> None:
    entry = _some(head, chance)
    entry["shape"] = [2**20, 2**20, *entry["shape"]]


def _offsets(head: dict[str, Any], chance: random.Random) -> None:
    entry = _some(head, chance)
    entry["data_offsets"] = [0, 2**50]


def _negative(head: dict[str, Any], chance: random.Random) -> None:
    _some(head, chance)["data_offsets"] = [-8, 8]


def _dtype(head: dict[str, Any], chance: random.Random) -> None:
    entry = _some(head, chance)
    entry["dtype"] = chance.choice(["F8_E5M2", "U64", "F64", "C64", "X99", "I8"])


def _same_width(head: dict[str, Any], chance: random.Random) -> None:
    entry = _some(head, chance)
    entry["dtype"] = {"F32": "I32", "I64": "F64", "BOOL": "U8", "F16": "BF16"}.get(
        entry["dtype"], "I8"
    )


def _renamed(head: dict[str, Any], chance: random.Random, name: str) -> dict[str, Any]:
    old = chance.choice(sorted(n for n in head if n != "__metadata__"))
    return {(name if n == old else n): value for n, value in head.items()}


def _swapped(head: dict[str, Any], chance: random.Random) -> None:
    """Two tensors of one shape in each other's place."""
    names = sorted(n for n in head if n != "__metadata__")
    pairs = [(a, b) for a in names for b in names if a < b
             and head[a]["shape"] == head[b]["shape"] and head[a]["dtype"] == head[b]["dtype"]
             and head[a]["data_offsets"][1] > head[a]["data_offsets"][0]]  # fmt: skip
    if pairs:
        a, b = chance.choice(pairs)
        head[a], head[b] = head[b], head[a]
    else:
        _offsets(head, chance)


def _twice(head: dict[str, Any], chance: random.Random) -> bytes:
    name = chance.choice(sorted(n for n in head if n != "__metadata__"))
    again = json.dumps({name: head[name]})[1:-1]
    return (json.dumps(head)[:-1] + ", " + again + "}").encode()


def _metadata(key: str, value: str) -> Callable[[dict[str, Any], random.Random], None]:
    def edit(head: dict[str, Any], chance: random.Random) -> None:
        head.setdefault("__metadata__", {})[key] = value

    return edit


def _no_metadata(head: dict[str, Any], chance: random.Random) -> None:
    head.pop("__metadata__", None)
    head["__metadata__"] = {"format": "pt"}


def huge_head(data: bytes, chance: random.Random) -> bytes:
    return (2 ** chance.choice([40, 60, 63])).to_bytes(8, "little") + data[8:]


DEEP = "[" * 100_000
HEADS: dict[str, Damage] = {
    "a shape without end": on_head(_shape), "an end far away": on_head(_offsets),
    "an end before the beginning": on_head(_negative), "another dtype": on_head(_dtype),
    "a dtype of the same width": on_head(_same_width), "parts exchanged": on_head(_swapped),
    "a name twice": on_head(_twice), "a head without end": huge_head,
    "a foreign version": on_head(_metadata("version", "99")),
    "a foreign format": on_head(_metadata("format", "memwrap-strange")),
    "a deep description": on_head(_metadata("about", DEEP)),
    "a list as description": on_head(_metadata("about", "[]")),
    "endless numbers": on_head(_metadata("about", '{"columns": 1' + "0" * 5000 + "}")),
    "deep checksums": on_head(_metadata("crc32", DEEP)),
    "no description": on_head(_no_metadata),
    **{f"the name {name[:12]!r}": on_head(partial(_renamed, name=name)) for name in (
        "strange", "memories.x" + ".y" * 3000, "../../etc/passwd", "\u202egnihton", "",
        "rows.fill.x",
    )},
}  # fmt: skip

# JSON files


def on_json(edit: Callable[[Any], Any]) -> Damage:
    def change(data: bytes, chance: random.Random) -> bytes:
        return json.dumps(edit(json.loads(data))).encode()

    return change


def text(value: str | bytes) -> Damage:
    return lambda data, chance: value if isinstance(value, bytes) else value.encode()


def doubled(data: bytes, chance: random.Random) -> bytes:
    """A key twice, the second time with another value."""
    values = json.loads(data)
    key = chance.choice(sorted(values))
    return (json.dumps(values)[:-1] + f", {json.dumps(key)}: 7}}").encode()


def every_number(value: Any) -> Callable[[Any], Any]:
    def edit(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: edit(child) for key, child in node.items()}
        if isinstance(node, list):
            return [edit(child) for child in node]
        return value if isinstance(node, (int, float)) and not isinstance(node, bool) else node

    return edit


JSONS: dict[str, Damage] = {
    "too deep": text(DEEP), "deep objects": text('{"a":' * 50_000), "a list": text("[]"),
    "a number": text("3"), "nothing": text("null"), "a huge list": text("[" + "1," * 10**6 + "1]"),
    "a huge text": text('{"a": "' + "x" * 2**22 + '"}'), "a huge number": text("1" * 10**5),
    "a mark in front": lambda data, chance: b"\xef\xbb\xbf" + data, "a key twice": doubled,
    "numbers below zero": on_json(every_number(-1)), "huge numbers": on_json(every_number(2**62)),
    "numbers that are none": on_json(every_number(float("nan"))),
    "numbers as text": on_json(every_number("8")), "lists for numbers": on_json(every_number([8])),
}  # fmt: skip


# Places


def missing(file: Path, outside: Path) -> None:
    file.unlink()


def a_folder(file: Path, outside: Path) -> None:
    file.unlink()
    file.mkdir()


def a_link_out(file: Path, outside: Path) -> None:
    """The right contents, elsewhere."""
    target = outside / file.name
    shutil.move(file, target)
    file.symlink_to(target)


def a_link_up(file: Path, outside: Path) -> None:
    target = outside / file.name
    shutil.move(file, target)
    file.symlink_to(os.path.relpath(target, file.parent))


def a_link_to_itself(file: Path, outside: Path) -> None:
    file.unlink()
    file.symlink_to(file.name)


def a_link_to_a_device(file: Path, outside: Path) -> None:
    file.unlink()
    file.symlink_to("/dev/zero")


def a_pipe(file: Path, outside: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def a_pickle(file: Path, outside: Path) -> None:
    file.write_bytes(pickle.dumps(Marker(str(outside / "CODE-RAN"))))


PLACES = (missing, a_folder, a_link_out, a_link_up, a_link_to_itself, a_link_to_a_device, a_pipe,
          a_pickle)  # fmt: skip


def of_place(name: str, how: Callable[[Path, Path], None]) -> Attack:
    def apply(folder: Path, other: Path, outside: Path, chance: random.Random) -> None:
        clear(outside)
        how(folder / name, outside)

    return Attack(f"{name}: {how.__name__.replace('_', ' ')}", apply)


def clear(outside: Path) -> None:
    for path in outside.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def of_bytes(name: str, what: str, change: Damage) -> Attack:
    def apply(folder: Path, other: Path, outside: Path, chance: random.Random) -> None:
        file = folder / name
        data = change(file.read_bytes(), chance)
        file.unlink()
        file.write_bytes(data)

    return Attack(f"{name}: {what}", apply)


def from_another(name: str) -> Attack:
    """A file of another save of the same kind."""

    def apply(folder: Path, other: Path, outside: Path, chance: random.Random) -> None:
        (folder / name).unlink()
        shutil.copyfile(other / name, folder / name)

    return Attack(f"{name}: of another save", apply)


# A save that was stopped, as its writer did not leave it


def stopped(what: str, make: Callable[[Path, Path], Any]) -> Attack:
    def apply(folder: Path, other: Path, outside: Path, chance: random.Random) -> None:
        clear(outside)
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        (folder / ".saved" / "sub").mkdir(parents=True)
        make(folder / ".saved", outside)

    return Attack(f".saved: {what}", apply)


def _gone_elsewhere(saved: Path, outside: Path) -> None:
    (outside / "gone").write_text("[]")
    (saved / ".gone.json").symlink_to(outside / "gone")


def _all_elsewhere(saved: Path, outside: Path) -> None:
    shutil.move(saved, outside / "saved")
    saved.symlink_to(outside / "saved")


def _files_elsewhere(saved: Path, outside: Path) -> None:
    for file in [path for path in saved.parent.iterdir() if path.is_file()]:
        shutil.copy(file, outside)
        (saved / file.name).symlink_to(outside / file.name)


STOPPED = (
    stopped("old folders go elsewhere", lambda saved, o: (saved / ".old").symlink_to(o)),
    stopped("old folders go into a file", lambda saved, o: (saved / ".old").write_text("")),
    stopped("a list elsewhere of what goes", _gone_elsewhere),
    stopped("a deep list of what goes", lambda saved, o: (saved / ".gone.json").write_text(DEEP)),
    stopped("a pipe for what goes", lambda saved, o: os.mkfifo(saved / ".gone.json")),
    stopped("names elsewhere of what goes",
            lambda saved, o: (saved / ".gone.json").write_text('["../outside", 3, "sub"]')),
    stopped("it is elsewhere", _all_elsewhere),
    stopped("its files are elsewhere", _files_elsewhere),
)  # fmt: skip


def attacks_on(target: str, whole: Path, port: int) -> list[Attack]:
    """All attacks on the files of a whole folder, and those that concern its kind."""
    from forged import forgeries

    found: list[Attack] = []
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file())
    names = [name for name in names if not name.endswith((".py", ".md", ".lock"))]
    # Of many files of one kind some are enough.
    shards = [name for name in names if "shard-" in name]
    for name in [name for name in names if name not in shards[1:]]:
        if target == "recipe":  # text that the user names: any other text is another recipe
            found += [of_place(name, how) for how in PLACES if "link_" not in how.__name__]
            found += [of_bytes(name, c.__name__, c) for c in (garbage, archive, torch_file, utf16)]
            continue
        found += [of_place(name, how) for how in PLACES]
        if target == "model-in-shards":  # no checksums: of another program
            if name.endswith(".safetensors"):
                found += [of_bytes(name, what, change) for what, change in HEADS.items()
                          if what != "parts exchanged"]  # fmt: skip
            continue
        found += [
            of_bytes(name, f"{change.__name__} {i}", change) for i, change in enumerate(BYTES)
        ]
        if len(names) > 1 and target != "server":  # another state under a name is what it is now
            found.append(from_another(name))
        if name.endswith(".safetensors"):
            head = head_of((whole / name).read_bytes())[0]
            some = any(entry.get("shape") for entry in head.values())
            found += [of_bytes(name, what, change) for what, change in HEADS.items()
                      if some or what.startswith(("a head", "a foreign", "a deep"))]  # fmt: skip
        if name.endswith(".json"):
            found += [of_bytes(name, what, change) for what, change in JSONS.items()]
    if target.startswith(("model", "export", "store", "library")):
        found += STOPPED
    return found + forgeries(target, whole, port)
