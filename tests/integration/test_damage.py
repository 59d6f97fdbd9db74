"""200 damaged and foreign files: saved models, exports, states, stores. Every one is refused.

The error is a ValueError or FileNotFoundError of memwrap that names the file (or the folder, for
what concerns several files), never another library's traceback and never a model that loads.
"""

from __future__ import annotations

import json
import random
import shutil
import traceback
from collections.abc import Callable, Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
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
    pickled,
    torch_file,
    web_page,
    with_head,
    zeroed,
)
from small import ROOT, documents, llama, wrapped

import memwrap
from memwrap import exporting
from memwrap.stores import FaissStore, TorchStore, open_store
from memwrap.testing.helpers import randomise

NUMBER = 200


# What is damaged


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything, in folders of their own."""
    root = tmp_path_factory.mktemp("whole")
    model = randomise(wrapped("armt")).eval()
    model.save_pretrained(root / "model")
    model.save_pretrained(root / "model_with_base", include_base=True)
    exporting.export(model, root / "export", check=False)
    model.read(documents([21])[0]["input_ids"]).save(root / "state" / "state.safetensors")
    vectors = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    store = FaissStore(4, path=root / "faiss", shard_size=100)
    for part in vectors.split(100):
        store.add(part)
    store.remove([3])
    store.build()
    store.close()
    exact = TorchStore(4)
    exact.add(vectors)
    exact.save(root / "torch")
    return root


def load_model(folder: Path) -> Any:
    return memwrap.load(folder, llama())


def load_store(folder: Path) -> Any:
    store = open_store(folder)
    if isinstance(store, FaissStore):
        store.verify()
    return store


LOADERS: dict[str, Callable[[Path], Any]] = {
    "model": load_model,
    "model_with_base": memwrap.load,
    "export": memwrap.load,
    "state": lambda folder: memwrap.MemoryState.load(
        folder / "state.safetensors", randomise(wrapped("armt")).eval()
    ),
    "faiss": load_store,
    "torch": load_store,
}
# The files that loading reads; the code of an export is Python and read by transformers alone.
FILES = {
    "model": ("model.safetensors", "config.json"),
    "model_with_base": ("model.safetensors", "config.json"),
    "export": ("model.safetensors", "config.json"),
    "state": ("state.safetensors",),
    "faiss": ("store.json", "index.json", "index-*.faiss", "shard-000001.safetensors",
              "removed.safetensors"),
    "torch": ("store.safetensors",),
}  # fmt: skip


# A store may have none: an index is made again.
OPTIONAL = ("index.json",)


# How


def other_json(data: bytes, chance: random.Random) -> bytes:
    return json.dumps(chance.choice([[], 3, "x", None, {"a": 1}, {"model_type": "llama"}])).encode()


RAW: tuple[Damage, ...] = (
    cut, flipped, zeroed, garbage, pickled, torch_file, archive, numpy_file, web_page,
    git_pointer, empty, other_tensors, other_json,
)  # fmt: skip


def renamed_tensor(data: bytes, chance: random.Random) -> bytes:
    head, rest = head_of(data)
    name = chance.choice([n for n in head if n != "__metadata__"])
    return with_head({("strange" if n == name else n): v for n, v in head.items()}, rest)


def another_shape(data: bytes, chance: random.Random) -> bytes:
    head, rest = head_of(data)
    names = [n for n, v in head.items() if n != "__metadata__" and np.prod(v["shape"]) > 0]
    entry = head[chance.choice(names)]
    entry["shape"] = [1, *entry["shape"]]
    return with_head(head, rest)


def from_the_future(data: bytes, chance: random.Random) -> bytes:
    """A version that this memwrap does not know."""
    head, rest = head_of(data)
    head.setdefault("__metadata__", {})["version"] = str(chance.randrange(50, 99))
    return with_head(head, rest)


def no_description(data: bytes, chance: random.Random) -> bytes:
    head, rest = head_of(data)
    head.pop("__metadata__", None)
    return with_head(head, rest)


def edited(**changes: Any) -> Damage:
    """A JSON file with some values changed (None: left out)."""

    def damage(data: bytes, chance: random.Random) -> bytes:
        values = {**json.loads(data), **changes}
        return json.dumps({k: v for k, v in values.items() if v is not None}).encode()

    damage.__name__ = f"edited {changes}"
    return damage


TENSORS: tuple[Damage, ...] = (renamed_tensor, another_shape)
OWN_TENSORS: tuple[Damage, ...] = (from_the_future, no_description)
ARMT = {"name": "armt", "segment_size": 8, "num_memory_tokens": 2, "d_mem": 8}
CONFIG: tuple[Damage, ...] = (
    edited(model_type="llama"), edited(model_type=None), edited(memories=3),
    edited(memories=[{}]), edited(memories=[{"name": "artm"}]), edited(memories=[]),
    edited(memories=[ARMT | {"segment_size": -8}]), edited(memories=[ARMT | {"d_mem": 16}]),
    edited(memories=[ARMT | {"learned_in_the_future": True}]), edited(memories=["armt"]),
    edited(backbone=None), edited(backbone={}), edited(backbone={"model_type": "hal9000"}),
    edited(backbone=7), edited(adapters={"default": {"peft_type": "NONE_SUCH"}}),
)  # fmt: skip
JSON_OF_STORES: tuple[Damage, ...] = (edited(version=99), edited(version=None), edited(format="x"))


def damages(name: str) -> tuple[Damage, ...]:
    """What is done to a file. A config is meant to be edited by hand: one flipped bit of it may
    give another right config, so it is left out there."""
    if name == "config.json":
        return (*(d for d in RAW if d is not flipped), *CONFIG)
    if name.endswith(".json"):
        return (*RAW, flipped, flipped, *JSON_OF_STORES)
    if name.endswith(".faiss"):
        return (*RAW, flipped)
    own = OWN_TENSORS if not name.startswith("model") else ()
    return (*RAW, flipped, flipped, flipped, *TENSORS, *own)


def cases(target: str) -> Iterator[tuple[str, str, Damage | None]]:
    """`(file, what is done, how)`; None takes the file away."""
    for name in FILES[target]:
        for number, damage in enumerate(damages(name)):
            yield name, f"{damage.__name__} {number}", damage
        if name not in OPTIONAL:
            yield name, "missing", None


def outcome(target: str, folder: Path, file: Path) -> str | None:
    """None if loading was refused as it should be, else what happened."""
    try:
        LOADERS[target](folder)
    except (ValueError, FileNotFoundError) as error:
        said = str(error)
        source = traceback.extract_tb(error.__traceback__)[-1].filename
        if not Path(source).is_relative_to(ROOT / "memwrap"):
            return f"raised by {source}: {said[:200]}"
        if file.name not in said and str(folder) not in said:
            return f"names no file: {said[:200]}"
        if len(said.splitlines()) > 12:
            return f"is no clear error: {said[:200]}"
        return None
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "was loaded"


@pytest.mark.proof("200 damaged or foreign files refused by name", "safetensors", "faiss-cpu")
@pytest.mark.parametrize("target", FILES)
def test_every_damaged_file_is_refused(whole: Path, tmp_path: Path, target: str) -> None:
    assert LOADERS[target](whole / target) is not None
    wrong = []
    for number, (pattern, what, damage) in enumerate(cases(target)):
        folder = tmp_path / f"{number}"
        shutil.copytree(whole / target, folder)
        file = next(folder.glob(pattern))
        if damage is None:
            file.unlink()
        else:
            data = file.read_bytes()
            new = damage(data, random.Random(number))
            assert new != data, what
            file.write_bytes(new)
        if problem := outcome(target, folder, file):
            wrong.append(f"{file.name}, {what}: {problem}")
        shutil.rmtree(folder)
    assert not wrong, "\n".join(wrong)


def test_there_are_enough() -> None:
    assert sum(len(list(cases(target))) for target in FILES) >= NUMBER


@pytest.mark.parametrize("every", [23, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["removed.safetensors", "index.json", "store.json"])
def test_no_flipped_bit_of_a_small_file_of_a_store_passes(
    whole: Path, tmp_path: Path, name: str, every: int
) -> None:
    """Every bit (or every so many), as safetensors orders its metadata anew in every file."""
    folder = tmp_path / "faiss"
    shutil.copytree(whole / "faiss", folder)
    data = (folder / name).read_bytes()
    wrong = []
    for place, bit in islice(product(range(len(data)), range(8)), 0, None, every):
        new = bytearray(data)
        new[place] ^= 1 << bit
        if json_of(bytes(new)) == json_of(data) is not None:
            continue  # another white space
        (folder / name).write_bytes(new)
        if problem := outcome("faiss", folder, folder / name):
            wrong.append(f"byte {place}, bit {bit}: {problem}")
    assert not wrong, "\n".join(wrong[:10])


def json_of(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None
