"""Forgeries of stores, libraries and recipes."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from attacks import Attack, clear
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from memwrap.io.checksums import checksums, head_digest
from memwrap.stores.files import read_arrays, read_json, write_arrays, write_json

NAN, HUGE = float("nan"), 2**62
Arrays = dict[str, np.ndarray]


def on_arrays(file: str, name: str, edit: Callable[[Arrays, dict[str, Any]], Any]) -> Attack:
    def apply(folder: Path, other: Path, outside: Path, chance: random.Random) -> None:
        path = sorted(folder.glob(file))[0]
        arrays, about = read_arrays(path)
        arrays = {n: array.copy() for n, array in arrays.items()}
        edit(arrays, about)
        write_arrays(path, arrays, about)

    return Attack(f"{file}, forged: {name}", apply)


def on_description(file: str, name: str, edit: Callable[[dict[str, Any]], Any]) -> Attack:
    def apply(folder: Path, other: Path, outside: Path, chance: random.Random) -> None:
        values = read_json(folder / file)
        for key in ("format", "version"):
            values.pop(key)
        edit(values)
        write_json(folder / file, values)

    return Attack(f"{file}, forged: {name}", apply)


def _set(name: str, value: Any, at: Any = slice(None)) -> Callable[[Arrays, Any], None]:
    def edit(arrays: Arrays, about: Any) -> None:
        arrays[name][at] = value

    return edit


COLUMNS: dict[str, Callable[[Arrays, dict[str, Any]], Any]] = {
    "vectors that are nan": _set("vectors", NAN), "one infinite number": _set("vectors", np.inf, 0),
    "vectors too narrow": lambda a, b: a.update(vectors=a["vectors"][..., :3]),
    "vectors in float64": lambda a, b: a.update(vectors=a["vectors"].astype(np.float64)),
    "no vectors": lambda a, b: a.pop("vectors"), "no values": lambda a, b: a.pop("values"),
    "an array more": lambda a, b: a.update(strange=np.ones(3, np.float32)),
    "values below -1": _set("values", -7), "documents that are not there": _set("documents", 1000),
    "documents below -1": _set("documents", -9), "starts below -1": _set("starts", -5),
    "fewer values": lambda a, b: a.update(values=a["values"][:5]),
    "ends before starts": _set("ends", 0), "no ends": _set("ends", -1),
    "names of documents that are numbers": lambda a, b: b.update(documents=[1, 2]),
    "documents twice": lambda a, b: b.update(documents=["d0", "d0"]),
    "no cursor": lambda a, b: b.pop("cursor"),
}  # fmt: skip


SHAPES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "shorter": lambda x: x[:-1], "the first gone": lambda x: x[1:], "empty": lambda x: x[:0],
    "longer": lambda x: np.concatenate([x, x[-1:]]), "a dimension more": lambda x: x[None],
    "a dimension behind": lambda x: x[..., None],
    "the last dimension shorter": lambda x: x[..., :-1],
    "the last dimension gone": lambda x: x[..., 0],
    "another dtype": lambda x: x.astype(np.float64 if x.dtype != np.float64 else np.int64),
}  # fmt: skip


def on_every_array(path: Path) -> list[Attack]:
    """Each array of a file in other shapes and dtypes, and not there."""
    found = []
    for name, array in sorted(read_arrays(path)[0].items()):
        for what, change in SHAPES.items() if array.size else ():
            found.append(on_arrays(path.name, f"{name}: {what}", lambda a, b, n=name, f=change: (
                a.update({n: np.ascontiguousarray(f(a[n]))}))))  # fmt: skip
        found.append(on_arrays(path.name, f"{name}: not there", lambda a, b, n=name: a.pop(n)))
    return found


def exact_stores(whole: Path) -> list[Attack]:
    file = "store.safetensors"
    found = [on_arrays(file, name, edit) for name, edit in COLUMNS.items()]
    found += on_every_array(whole / file)
    for name, value in {
        "dim": [0, -4, 2**40, "4", None, 3, True], "metric": ["cosine", None, 3],
        "rows": [[2], [2**40, 2**20], "x", [-1], None], "capacity": [0, -3, 2**62, "x", 7],
        "dtype": ["int8", "os", None], "notes": [3, []], "documents": [3, ["a"] * 3],
        "kind": ["pgvector"],
    }.items():  # fmt: skip
        for one in value:
            found.append(on_arrays(file, f"{name} = {one}", lambda a, b, n=name, v=one: b.update(
                {n: v})))  # fmt: skip
    for number in (-1, HUGE, 7):
        found.append(on_arrays(file, f"counts {number}", _set("counts", number)))
    found.append(on_arrays(file, "there in two dimensions more", lambda a, b: a.update(
        there=a["there"][None, None])))  # fmt: skip
    return found


FACTORIES = (
    "HNSW1000000000",
    "IVF1000000000,Flat",
    "PQ1000000x8",
    "PQ4x64",
    "../../etc/passwd",
    "Flat" * 99,
    "IDMap,Flat",
    "OPQ16_64,IVF262144(IVF512,PQ32x4fs,RFlat),PQ16x4fsr",
    "",
    3,
    "nonesuch",
    "IVF100000_HNSW4096,Flat",
    "ITQ4096",
    "Residual4096x64",
    "\u0000",
    "PCAR1000000,Flat",
)


def disk_stores(whole: Path, port: int) -> list[Attack]:
    file = "shard-000001.safetensors"
    found = [on_arrays(file, name, edit) for name, edit in COLUMNS.items()]
    found += [*on_every_array(whole / file), *on_every_array(whole / "removed.safetensors")]
    for name, one in {"first": 0, "count": 2**40}.items():
        found.append(
            on_arrays(file, f"{name} = {one}", lambda a, b, n=name, v=one: b.update({n: v}))
        )
    removed = {"out of range": [HUGE, 5], "below zero": [-3], "in float": [0.5]}
    for name, values in removed.items():
        found.append(on_arrays("removed.safetensors", f"ids {name}", lambda a, b, v=values: (
            a.update(ids=np.array(v)))))  # fmt: skip
    for name, values in {
        "dim": [0, -4, 2**40, 3, "4", None], "metric": ["cosine", "ip", None],
        "dtype": ["int8", None, "float32"], "kind": ["torch", None, "os"], "notes": [3, None],
        "id": [3], "removals": [False], "factory": FACTORIES,
    }.items():  # fmt: skip
        for one in values:
            found.append(on_description("store.json", f"{name} = {str(one)[:40]}",
                                        lambda v, n=name, x=one: v.update({n: x})))  # fmt: skip
    for name, values in {
        "file": ["../outside/index-1.faiss", "/etc/passwd", 3, "index-1.faiss", "store.json"],
        "count": [7, -1, 2**40, "300", None], "size": [0, 2**50], "crc32": [0, None],
        "shards": [[], None, [1, 2, 3]], "factory": FACTORIES,
    }.items():  # fmt: skip
        for one in values:
            found.append(on_description("index.json", f"{name} = {str(one)[:40]}",
                                        lambda v, n=name, x=one: v.update({n: x})))  # fmt: skip
    found += [forged_index(name, make) for name, make in INDEXES.items()]
    found.append(Attack("store.json, forged: a server", lambda f, o, u, c: write_json(
        f / "store.json", {"kind": "pgvector", "url": f"postgresql://127.0.0.1:{port}/x",
                           "dim": 4, "metric": "l2"})))  # fmt: skip
    return found


# Indexes of faiss that are not those of the store's vectors


def _vectors(folder: Path) -> np.ndarray:
    shards = sorted(folder.glob("shard-*.safetensors"))
    return np.concatenate([read_arrays(s)[0]["vectors"] for s in shards]).astype(np.float32)


def _flat(count: int, dim: int, folder: Path, outside: Path) -> Any:
    index = faiss.IndexFlatL2(dim)
    index.add(np.random.default_rng(0).random((count, dim), dtype=np.float32))
    return index


_held: list[Any] = []


def _lists_on_disk(folder: Path, outside: Path) -> Any:
    """Lists in a file elsewhere, which faiss opens as it reads the index."""
    vectors = _vectors(folder)
    index = faiss.index_factory(4, "IVF4,Flat")
    index.train(vectors)
    index.add(vectors)
    lists = faiss.OnDiskInvertedLists(index.nlist, index.code_size, str(outside / "lists"))
    parts = faiss.InvertedListsPtrVector()
    parts.push_back(index.invlists)
    lists.merge_from_multiple(parts.data(), parts.size())
    index.replace_invlists(lists)
    _held.append(lists)  # the index points to it
    return index


def _ids(folder: Path, outside: Path) -> Any:
    index = faiss.IndexIDMap(faiss.IndexFlatL2(4))
    index.add_with_ids(_vectors(folder), np.arange(300, dtype=np.int64) + 10**12)
    return index


def _own_ids(folder: Path, outside: Path) -> Any:
    vectors = _vectors(folder)
    index = faiss.index_factory(4, "IVF4,Flat")
    index.train(vectors)
    index.add_with_ids(vectors, np.arange(300, dtype=np.int64) * 7)
    return index


def _graph(folder: Path, outside: Path) -> Any:
    index = faiss.IndexHNSWFlat(4, 8)
    index.add(_vectors(folder))
    links = faiss.vector_to_array(index.hnsw.neighbors)
    links[::3] = 10**6
    faiss.copy_array_to_vector(links, index.hnsw.neighbors)
    return index


def _untrained(folder: Path, outside: Path) -> Any:
    return faiss.index_factory(4, "IVF4,Flat")


def _binary(folder: Path, outside: Path) -> Any:
    return b"IBxF" + bytes(200)


def _other_vectors(folder: Path, outside: Path) -> Any:
    return _flat(300, 4, folder, outside)


def _permuted_lists(folder: Path, outside: Path) -> Any:
    """The right vectors under wrong numbers."""
    vectors = _vectors(folder)
    index = faiss.index_factory(4, "IVF4,Flat")
    index.train(vectors)
    index.add(vectors[::-1].copy())
    return index


def _permuted_graph(folder: Path, outside: Path) -> Any:
    index = faiss.IndexHNSWFlat(4, 8)
    index.add(_vectors(folder)[::-1].copy())
    return index


INDEXES: dict[str, Callable[[Path, Path], Any]] = {
    "900 entries": lambda f, o: _flat(900, 4, f, o), "width 9": lambda f, o: _flat(300, 9, f, o),
    "none": lambda f, o: _flat(0, 4, f, o), "other vectors": _other_vectors,
    "lists in a file elsewhere": _lists_on_disk, "numbers of its own": _ids,
    "numbers in lists": _own_ids, "links out of range": _graph, "untrained": _untrained,
    "a binary index": _binary, "exchanged vectors in lists": _permuted_lists,
    "exchanged vectors in a graph": _permuted_graph,
}  # fmt: skip


def forged_index(name: str, make: Callable[[Path, Path], Any]) -> Attack:
    def apply(folder: Path, other: Path, outside: Path, chance: random.Random) -> None:
        clear(outside)
        file = next(folder.glob("index-*.faiss"))
        index = make(folder, outside)
        if isinstance(index, bytes):
            file.write_bytes(index)
        else:
            faiss.write_index(index, str(file))
        values = read_json(folder / "index.json")
        for key in ("format", "version"):
            values.pop(key)
        data = file.read_bytes()
        write_json(folder / "index.json", values | {"size": len(data), "crc32": zlib.crc32(data)})

    return Attack(f"index, forged: {name}", apply)


# Libraries


def libraries(whole: Path) -> list[Attack]:
    from forged import shapes_of, states

    def forge(name: str, edit: Callable[[dict[str, torch.Tensor], dict[str, str]], Any]) -> Attack:
        def apply(folder: Path, other: Path, outside: Path, chance: random.Random) -> None:
            path = folder / "documents.safetensors"
            with safe_open(path, framework="pt") as opened:
                metadata = dict(opened.metadata())
            tensors = load_file(path)
            edit(tensors, metadata)
            about = {key: metadata[key] for key in ("names", "state") if key in metadata}
            save_file({n: t.contiguous() for n, t in tensors.items()}, path,
                      metadata=metadata | checksums(tensors, **about))  # fmt: skip

        return Attack(f"documents.safetensors, forged: {name}", apply)

    def both(attack: Attack) -> Attack:
        """A forged state, and documents that say that it is theirs."""

        def apply(folder: Path, other: Path, outside: Path, chance: random.Random) -> None:
            attack.apply(folder, other, outside, chance)
            seal = forge("", lambda t, m: m.update(state=head_digest(folder / "state.safetensors")))
            seal.apply(folder, other, outside, chance)

        return Attack(attack.name, apply)

    found = [both(attack) for attack in states(whole / "state.safetensors")]
    for names in ("[]", "3", '["a", "a", "b"]', "[1, 2, 3]", "[" * 10**5, '["a"]'):
        found.append(forge(f"names {names[:20]}", lambda t, m, n=names: m.update(names=n)))
    for name in ("ids", "lengths", "entries"):
        for number in (-1, HUGE, 1000):
            found.append(forge(f"{name} {number}", lambda t, m, n=name, v=number: t.update(
                {n: torch.full_like(t[n], v)})))  # fmt: skip
        found.append(forge(f"no {name}", lambda t, m, n=name: t.pop(n)))
    for name, tensor in load_file(whole / "documents.safetensors").items():
        for what, change in shapes_of(tensor).items():
            found.append(forge(f"{name}: {what}", lambda t, m, n=name, f=change: t.update(
                {n: f(t[n])})))  # fmt: skip
    return found


# Recipes

WHOLE = "output: runs/x\nmemory: {name: rmt}\n"  # and what follows is what is wrong
TEXTS = {
    "a tag": "task: !!python/object/apply:os.mkdir ['{outside}/CODE-RAN']",
    "another tag": "task: !!python/name:os.system",
    "a secret": "output: runs/${oc.env:HOME}\nmemory: {name: rmt}",
    "a decoded call": "output: ${oc.decode:'1'}\nmemory: {name: rmt}",
    "a reference to itself": "output: ${output}\nmemory: {name: rmt}",
    "references in a circle": "output: ${task}\ntask: ${output}\nmemory: {name: rmt}",
    "nested references": "output: ${a.${b}}\nmemory: {name: rmt}",
    "deep": "a: " + "[" * 5000, "deep keys": "a: " + "{a: " * 3000,
    "deep by lines": "\n".join("  " * n + "a:" for n in range(2000)),
    "aliases": "\n".join(["a0: &a0 [x,x,x,x,x,x,x,x,x]"] + [
        f"a{i}: &a{i} [{','.join(f'*a{i - 1}' for _ in range(9))}]" for i in range(1, 9)]),
    "an alias of itself": "a: &a [*a]", "merged keys": "a: &a {x: 1}\nmemory: {<<: *a, name: rmt}",
    "a list": "- a\n- b", "a text": "hello", "nothing": "", "null": "null", "a number": "3",
    "unknown keys": "strange: 3\nmemory: {name: rmt}", "a tab": "memory:\n\tname: rmt",
    "no memory": "task: finetune", "a memory that is none": "memory: {name: ../../x}",
    "a memory's name in numbers": "memory: {name: 3}", "settings as text": "memory: rmt",
    "huge numbers": "memory: {name: rmt, segment_size: 99999999999999999999999}",
    "infinite": "memory: {name: rmt}\ntrainer: {learning_rate: .inf}",
    "not a number": "memory: {name: rmt}\ntrainer: {learning_rate: .nan}",
    "a server": "memory: {name: knnlm, store: 'postgresql://127.0.0.1:{port}/x'}",
    "data on a server": WHOLE + "data: {source: 'datasets:json', "
        "options: {data_files: 'http://127.0.0.1:{port}/x.json'}}",
    "data in a bucket": WHOLE + "data: {options: {data_files: {train: ['s3://b/x']}}}",
    "data behind an archive": WHOLE + "data: {options: {data_dir: 'zip://x::s3://b'}}",
    "a server in two parts": "task: finetune\noutput: ':'\nmemory: {name: knnlm, "
        "store: 'redis${output}//127.0.0.1:{port}'}",
    "a model on a server": WHOLE + "model: {name: 'http://127.0.0.1:{port}/m'}",
    "a stage on a server": WHOLE + "init_from: 'http://127.0.0.1:{port}/m'",
    "a pattern for adapters": WHOLE + "lora: {target_modules: '(a+)+$'}",
    "a tracker": WHOLE + "trainer: {report_to: wandb}",
    "a secret in a list": WHOLE + "tasks: {names: ['${oc.env:HOME}']}\ntask: tasks",
    "a secret as a key": WHOLE + "data: {options: {'${oc.env:HOME}': 1}}",
    "a secret within a reference": "output: ${${oc.env:HOME}}\nmemory: {name: rmt}",
    "a secret behind a backslash": "output: 'a\\\\${oc.env:HOME}'\nmemory: {name: rmt}",
    "another resolver": "output: ${oc.create:x}${oc.select:a}\nmemory: {name: rmt}",
    "a call with spaces": "output: '${ oc.env : HOME }'\nmemory: {name: rmt}",
    "a relative reference": "output: ${..task}\nmemory: {name: rmt}",
    "a reference that is open": "output: '${task'\nmemory: {name: rmt}",
    "two documents": "task: finetune\n---\ntask: recall", "binary": "a: !!binary aGVsbG8=",
    "a null byte": "task: 'a\x00b'", 
    "a huge text": "output: " + "x" * 2**21,
    "bidi": "output: 'runs/\u202egnp'\nmemory: {nam\u0435: rmt}",
    "keys that are lists": "? [a, b]\n: 3", "many keys": "\n".join(f"k{n}: 1" for n in range(9999)),
    "a set": "task: !!set {a, b}", "sexagesimal": "data: {train: 0:8}\nmemory: {name: rmt}",
    "an output that is a list": "output: [a]\nmemory: {name: rmt}",
    "missing": "output: ???\nmemory: {name: rmt}", "a key twice": "task: recall\ntask: finetune",
}  # fmt: skip


def recipes(port: int) -> list[Attack]:
    def attack(name: str, text: str) -> Attack:
        def apply(folder: Path, other: Path, outside: Path, chance: random.Random) -> None:
            clear(outside)
            text_ = text.replace("{outside}", str(outside)).replace("{port}", str(port))
            (folder / "run.yaml").write_text(text_, encoding="utf-8")

        return Attack(f"run.yaml: {name}", apply)

    return [attack(name, text) for name, text in TEXTS.items()]
