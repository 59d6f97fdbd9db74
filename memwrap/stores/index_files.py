"""A store's index on disk: written beside the shards that it is of, and refused beside others."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from memwrap.io.atomic_files import replacing
from memwrap.io.reading import inside
from memwrap.stores.files import file_checksum, read_json, write_json
from memwrap.stores.indexes import faiss_module, measure_of
from memwrap.stores.shards import Shards

INDEX = "index.json"
_LISTS = re.compile(r"IVF(\d+)")


def is_sane(factory: Any, dim: int) -> bool:
    """Tell whether a factory string describes an index of a usual size for vectors of width `dim`:
    it is short, and only the numbers of inverted lists are large."""
    if not isinstance(factory, str) or not re.fullmatch(r"[\w.,()-]{1,64}", factory):
        return False
    rest = _LISTS.sub("", factory)
    return all(int(number) <= max(4096, dim) for number in re.findall(r"\d+", rest))


def check_lists(factory: str, count: int) -> None:
    """Refuse an index of more inverted lists than there are vectors, before they are made."""
    if any(int(number) > count for number in _LISTS.findall(factory)):
        raise ValueError(
            f"`factory` {factory!r} has more lists than the {count} vectors there are."
        )


def train_index(index: Any, shards: Shards, factory: str) -> None:
    """Make an index's centroids and codes from evenly spread vectors.

    Raises:
        ValueError: if there are too few of them.
    """
    inverted, count = faiss_module().try_extract_index_ivf(index), len(shards)
    most = 64 * inverted.nlist if inverted is not None else 65_536
    chosen = np.unique(np.linspace(0, count - 1, min(count, max(most, 10_000))).astype(np.int64))
    sample = shards.gather(chosen).astype(np.float32)
    try:
        index.train(sample)
    except RuntimeError as error:
        raise ValueError(
            f"faiss cannot train {factory!r} on {len(sample)} vectors: {error}"
        ) from error


def add_to(index: Any, vectors: np.ndarray, factory: str) -> None:
    """Add float32 vectors to an index; a kind that takes none without numbers is refused."""
    try:
        index.add(vectors)
    except RuntimeError as error:
        raise ValueError(f"faiss cannot add vectors to an index of {factory!r}.") from error


def index_file(folder: Path, shards: Shards) -> tuple[Path, dict[str, Any]]:
    """Return the file of a store's index and what is written about it, which must fit the shards.

    Raises:
        FileNotFoundError: if it is missing.
        ValueError: if it is damaged or of another store.
    """
    about = read_json(folder / INDEX)
    name, count, factory = (about.get(key) for key in ("file", "count", "factory"))
    known = isinstance(name, str) and re.fullmatch(r"index-\d+\.faiss", name)
    if not known or type(count) is not int or not is_sane(factory, shards.dim):
        raise ValueError(f"{folder / INDEX} is damaged: it does not describe an index.")
    file = inside(folder, name)
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; delete {INDEX} beside it to build anew.")
    if file.stat().st_size != about.get("size"):
        raise ValueError(f"{file} is damaged; delete it and {INDEX} to build the index anew.")
    if shards.checksums_of(count) != about.get("shards"):
        raise ValueError(
            f"{file} covers {count} entries; it is not of the shards of {folder}, which hold "
            f"{len(shards)}: a shard is missing or another one."
        )
    return file, about


def write_index(folder: Path, index: Any, factory: str, shards: Shards) -> None:
    """Put an index beside its shards: first the file, then what points to it."""
    count = index.ntotal
    name = f"index-{count:012d}.faiss"
    if (folder / INDEX).is_file() and read_json(folder / INDEX).get("file") == name:
        name = f"index-{count:012d}0.faiss"  # another index of as many: the old one stays meanwhile
    with replacing(folder / name) as temporary:
        faiss_module().write_index(index, str(temporary))
        size, checksum = temporary.stat().st_size, file_checksum(temporary)
    about = {
        "file": name, "count": count, "factory": factory, "size": size, "crc32": checksum,
        "shards": shards.checksums_of(count),
    }  # fmt: skip
    write_json(folder / INDEX, about)
    for old in folder.glob("index-*.faiss"):
        if old.name != name:
            old.unlink()


def written_size(folder: Path, count: int) -> int:
    """Count the bytes of the index on disk, if it covers `count` entries; else 0."""
    about = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    return int(about["size"]) if about.get("count") == count else 0


def read_index(file: Path, dim: int, metric: str, count: int, *, mmap: bool = False) -> Any:
    """Read an index that must fit a store.

    Args:
        file: as faiss wrote it.
        dim, metric: of the store.
        count: entries that it covers.
        mmap: map it from disk.

    Raises:
        ValueError: if faiss cannot read it, or it is another one.
    """
    faiss = faiss_module()
    broken = f"{file} is damaged; delete it and index.json to build the index anew"
    limited = hasattr(faiss, "set_deserialization_vector_byte_limit")
    if limited:  # nothing is allocated because the file says so
        before = faiss.get_deserialization_vector_byte_limit()
        faiss.set_deserialization_vector_byte_limit(max(2**31, 4 * file.stat().st_size))
    try:
        # Lists that an index has in another file are looked for beside it, and then refused.
        flags = faiss.IO_FLAG_ONDISK_SAME_DIR | (faiss.IO_FLAG_MMAP_IFC if mmap else 0)
        index = faiss.read_index(str(file), flags)
    except Exception as error:  # RuntimeError, and what SWIG makes of a failed allocation
        raise ValueError(f"{broken} (faiss cannot read it).") from error
    finally:
        if limited:
            faiss.set_deserialization_vector_byte_limit(before)
    got, want = (index.d, index.ntotal, index.metric_type), (dim, count, measure_of(metric))
    if got != want or not index.is_trained:
        raise ValueError(f"{broken}: width, entries and metric are {got}, not {want}.")
    lists = faiss.try_extract_index_ivf(index)
    if lists is not None and isinstance(
        faiss.downcast_InvertedLists(lists.invlists), faiss.OnDiskInvertedLists
    ):
        raise ValueError(f"{broken}: its lists are in another file.")
    if not mmap:
        _check_numbers(index, file)
    return index


def _check_numbers(index: Any, file: Path) -> None:
    """Refuse an index that points to entries that are not there."""
    faiss = faiss_module()
    inner = faiss.downcast_index(index)
    while isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    if isinstance(inner, faiss.IndexHNSW):
        graph = inner.hnsw
        pointers = [faiss.vector_to_array(graph.neighbors), np.array([graph.entry_point])]
    elif isinstance(inner, faiss.IndexIVF):
        lists = inner.invlists
        sizes = [lists.list_size(number) for number in range(lists.nlist)]
        pointers = [faiss.rev_swig_ptr(lists.get_ids(n), s) for n, s in enumerate(sizes) if s]
        if sum(sizes) != index.ntotal:
            raise ValueError(f"{file} is damaged: its lists hold {sum(sizes)} entries.")
    else:
        return
    for numbers in pointers:
        if numbers.size and (numbers.min() < -1 or numbers.max() >= index.ntotal):
            raise ValueError(f"{file} is damaged: it points to entries that are not there.")


def verify_index(folder: Path, shards: Shards, metric: str) -> None:
    """Read every byte of a store's index, if it has one, and compare a sample of what it holds
    with the vectors kept.

    Raises:
        ValueError: names the damaged file.
    """
    if not (folder / INDEX).is_file():
        return
    file, about = index_file(folder, shards)
    if file_checksum(file) != about["crc32"]:
        raise ValueError(f"{file} is damaged: its contents do not have their checksum.")
    faiss, index = faiss_module(), read_index(file, shards.dim, metric, about["count"])
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexHNSW):
        inner = faiss.downcast_index(inner.storage)
    lists = isinstance(inner, faiss.IndexIVF)
    if not index.ntotal or not (lists or isinstance(inner, faiss.IndexFlat)):
        return
    if lists:
        inner.make_direct_map()
    sample = np.unique(np.linspace(0, index.ntotal - 1, min(index.ntotal, 4096)).astype(np.int64))
    held = np.stack([inner.reconstruct(int(number)) for number in sample])
    kept = shards.gather(sample).astype(np.float32)
    if isinstance(inner, (faiss.IndexFlat, faiss.IndexIVFFlat)):
        good = np.array_equal(held, kept)
    else:  # codes: nearer to their own vectors than to others
        own_distance, other_distance = (
            np.square(held - x).sum(1).mean() for x in (kept, np.roll(kept, 1, 0))
        )
        good = len(sample) < 2 or own_distance <= other_distance
    if not good:
        raise ValueError(f"{file} is damaged: it does not hold the store's vectors.")
