"""A faiss index's copy on a GPU: it answers searches; the index itself stays on the CPU, where it
grows, has its entries removed, and is written to disk."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch

from memwrap.stores.indexes import faiss_module

MOST = 2048
"""Neighbours of a query, and lists of a search, that faiss takes on a GPU."""
SCRATCH = 2**28
"""Bytes that faiss may take for intermediate results; it would take 1.5 GB."""


class GpuCopy:
    """The place where a store searches.

    Args:
        device: `"cuda"` or `"cuda:N"`, `"cpu"`, or None: on a GPU where faiss has one and takes the
            kind of index, and there is room.

    Raises:
        ImportError: if a GPU is asked for and faiss was built without them.
        ValueError: for a bad device, or a GPU that is not there.
    """

    def __init__(self, device: str | torch.device | None) -> None:
        self.asked = device is not None
        self.number = _number(None if device is None else str(device))
        self._copied: Any = None  # the index that was copied, and how many entries it had
        self._copy: Any = None
        self._refused: Any = None
        self._resources: Any = None

    def of(self, index: Any, entries: int, neighbours: int, effort: int | None) -> Any:
        """Return the copy of `index` as it is now, ready for a search; None: search the index
        itself.

        Args:
            index: on the CPU.
            entries: how many it holds.
            neighbours: of a query; above `MOST` only the index itself gives so many.
            effort: see `FaissStore`.

        Raises:
            ValueError: if a GPU was asked for and does not take this index.
        """
        if self.number is None or neighbours > MOST or self._refused is index:
            return None
        if self._copied is None or self._copied[0] is not index or self._copied[1] != entries:
            self.drop()
            self._copy = self._made(index)
            if self._copy is None:
                self._refused = index
                return None
            self._copied = index, entries
        lists = faiss_module().try_extract_index_ivf(index)
        if lists is not None:
            probes = min(effort or 32, lists.nlist, MOST)
            faiss_module().GpuParameterSpace().set_index_parameter(self._copy, "nprobe", probes)
        return self._copy

    def drop(self) -> None:
        """Give the GPU's memory back."""
        self._copied = self._copy = self._refused = None

    def _made(self, index: Any) -> Any:
        faiss = faiss_module()
        if not _taken(index):
            return self._without("faiss has no such kind of index on a GPU")
        if self._resources is None:
            self._resources = faiss.StandardGpuResources()
            self._resources.setTempMemory(SCRATCH)
        options = faiss.GpuClonerOptions()
        options.allowCpuCoarseQuantizer = True  # lists that are found through a graph
        # Tables of 64 codes fit a GPU's shared memory in float16 only.
        options.useFloat16 = isinstance(_inner(index), faiss.IndexIVFPQ)
        try:
            return faiss.index_cpu_to_gpu(self._resources, self.number, index, options)
        except RuntimeError as error:
            reason = (str(error).strip().splitlines() or ["no reason given"])[-1]
            if not self.asked:
                warnings.warn(
                    f"The index is searched on the CPU; GPU {self.number} does not take it: "
                    f"{reason}. device='cpu' says so without a warning.", stacklevel=2,
                )  # fmt: skip
            return self._without(reason)

    def _without(self, reason: str) -> None:
        if self.asked:
            raise ValueError(
                f"The index cannot be searched on GPU {self.number}: {reason}. Use device='cpu', "
                "or a `factory` such as 'Flat' or 'IVF4096,Flat'."
            )


def _number(device: str | None) -> int | None:
    """Return the GPU's number, None for the CPU."""
    if device == "cpu":
        return None
    if device is not None and not re.fullmatch(r"cuda(:\d+)?", device):
        raise ValueError(f"`device` is {device!r}; allowed: 'cpu', 'cuda', 'cuda:N', None.")
    given = (device or "cuda").partition(":")[2]
    faiss = faiss_module() if device is not None else _faiss_or_none()
    if not hasattr(faiss, "StandardGpuResources"):
        if device is None:
            return None
        raise ImportError(
            f"device={device!r} needs faiss with GPUs: pip uninstall faiss-cpu, then "
            "pip install 'memwrap[gpu]'."
        )
    count = faiss.get_num_gpus()
    current = torch.cuda.current_device() if torch.cuda.is_available() else 0
    number = int(given) if given else current
    if number < count:
        return number
    if device is None:
        return None
    raise ValueError(f"`device` is {device!r}; faiss sees {count} GPUs.")


def _faiss_or_none() -> Any:
    """Import faiss if it is there: it is needed when an index is, not before."""
    try:
        return faiss_module()
    except ImportError:
        return None


def _inner(index: Any) -> Any:
    """Return the index behind transformations."""
    faiss = faiss_module()
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    return inner


def _taken(index: Any) -> bool:
    faiss = faiss_module()
    kinds = (
        faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer,
    )  # fmt: skip
    return isinstance(_inner(index), kinds)
