"""MemoryState: everything a model remembers between calls, as one transformers `Cache`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache

from memwrap.io.atomic_files import replacing
from memwrap.io.checksums import check_sums, checksums
from memwrap.io.reading import parse_json
from memwrap.state.file_check import (
    COLUMNS,
    COUNTERS,
    check_count,
    check_finite,
    check_layout,
    check_rows,
)
from memwrap.state.open_segment import OpenSegment
from memwrap.state.past import Recorded, cropped
from memwrap.state.trees import (
    Tree,
    aligned,
    alike,
    tree_build,
    tree_leaves,
    tree_map,
    tree_to,
)

FORMAT, VERSION = "memwrap-state", 7


NEVER = 2**62  # where no token is part of an answer
BACKBONE = "backbone"  # the name, among the memories, of what recurrent layers of its own remember


_HASH_BASE = 6364136223846793005


class MemoryState(Cache):
    """The memory of the rows of a batch. Pass it as `cache`.

    Memories hold what closed segments left; the keys and values of the open segment wait
    beside them until it is full. Tensors are never written in place: a clone costs nothing and
    two states never see each other.

    Examples:
        >>> import memwrap, torch
        >>> model = memwrap.load("armt-lm")
        >>> first, second = model.read([list(range(200))]), model.read([list(range(90))])
        >>> both = memwrap.MemoryState.cat([first, second])
        >>> both.tokens_seen, both.select(torch.tensor([1])).tokens_seen
        (tensor([200,  90]), tensor([90]))
        >>> first.repeat(3).batch_size
        3
        >>> first.save("book.safetensors")
        >>> memwrap.MemoryState.load("book.safetensors", model).tokens_seen
        tensor([200])

    Attributes:
        memories: a tree of tensors for each memory, batch first; with the name "backbone" also
            for what the backbone's own recurrent layers remember, where it has any.
        open: the rows' open segments.
        fill: `(B,)` tokens in each row's open segment.
        segments: `(B,)` segments closed.
        tokens_seen: `(B,)` tokens read, padding not counted.
        answer_from: `(B,)` the number, from 0, of the first token of each row that is part of an
            answer, for memories that tell answers from the rest (`window` with `decode="full"`);
            None where nothing was said.
        hold_open: while true no segment closes (`generate(..., remember=False)`).
        signature: which memories on which backbone the state belongs to.
        weights: fingerprint of the weights that wrote it, or None while training.
        chat: the open chat turn that the state stands in (`memwrap.chat`), or None.
        recorded: what was read since `activate_past_recording` or the last `crop`.
        owed: `(B, N)` ids that a model reads first at its next call, after a `crop`; or None.
    """

    is_compileable = False
    is_croppable = True

    def __init__(self, memories: dict[str, Tree], batch_size: int, signature: dict | None = None):
        super().__init__(layers=[])
        self.memories = memories
        self.fill = torch.zeros(batch_size, dtype=torch.long)
        self.segments = torch.zeros(batch_size, dtype=torch.long)
        self.tokens_seen = torch.zeros(batch_size, dtype=torch.long)
        self.columns = 0
        self.open = OpenSegment.empty(batch_size)
        self.ids_hash: Tensor | None = torch.zeros(batch_size, dtype=torch.long)
        self.mask_hash = torch.zeros(batch_size, dtype=torch.long)
        self.answer_from: Tensor | None = None
        self.hold_open = False
        self.signature = signature or {}
        self.weights: dict[str, str] | None = None
        self.unverified = False
        self.chat: dict | None = None
        self.record_past = False
        self.recorded: Recorded | None = None
        self.owed: Tensor | None = None

    # What a transformers cache is asked

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return (
            f"MemoryState(memories={list(self.memories)}, rows={self.batch_size}, "
            f"tokens_seen={self.tokens_seen.tolist()}, nbytes={self.nbytes})"
        )

    @property
    def is_linear(self) -> list[bool]:
        # For transformers a cache of recurrent layers alone has no length to cut a prompt by.
        return [False]

    @property
    def batch_size(self) -> int:
        return self.fill.shape[0]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Count the columns consumed, padding included: `generate` slices its input by it."""
        return self.columns + (0 if self.owed is None else self.owed.shape[1])

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._become(self.select(beam_idx))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._become(self.select(indices))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._become(self.repeat(repeats))

    def activate_past_recording(self) -> None:
        """Keep what is read from now on, until the next `crop`, so that all of it can be taken
        back: assisted decoding does this."""
        self.record_past = True

    @property
    def droppable(self) -> int:
        """Tokens that `crop` can take back without a record: those of the open segments, if nothing
        but their keys and values was kept."""
        return 0 if self.open.noted else int(self.fill.min())

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of every row, in place.

        Tokens of a segment that is still open are dropped. Others can be taken back if they were
        recorded: the state goes back to the one before, and the model reads what stays again at
        its next call.

        Examples:
            >>> import memwrap
            >>> model = memwrap.load("armt-lm")
            >>> state = model.read([list(range(300))])  # 44 tokens are open
            >>> state.crop(-40)
            >>> state.tokens_seen, state.fill
            (tensor([260]), tensor([4]))

        Args:
            tokens_to_remove: minus their number, as for every cache of transformers.

        Raises:
            ValueError: if they cannot be taken back.
        """
        self._become(cropped(self, tokens_to_remove))

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError("A MemoryState is read by a memwrap model, not by a backbone alone.")

    # Copies and selections

    def _become(self, other: MemoryState) -> None:
        """Take over what another state holds, all at once."""
        self.__dict__.update(other.__dict__)

    def _map(self, tensors: Callable[[Tensor], Tensor], rows: Callable[[Tensor], Tensor]):
        new = MemoryState.__new__(MemoryState)
        new.__dict__.update(self.__dict__)
        new.memories = {name: tree_map(tensors, tree) for name, tree in self.memories.items()}
        new.open = self.open.map(tensors, rows)
        for name in COUNTERS:
            setattr(new, name, rows(getattr(self, name)))
        new.mask_hash = rows(self.mask_hash)
        for name in ("ids_hash", "owed", "answer_from"):
            value = getattr(self, name)
            setattr(new, name, None if value is None else rows(value))
        new.recorded = None
        return new

    def clone(self) -> MemoryState:
        """Copy the state. Tensors are shared, which is safe: none is written in place."""
        return self._map(lambda t: t, lambda t: t)

    def __deepcopy__(self, memo: dict) -> MemoryState:
        return self.clone()

    def detach(self) -> MemoryState:
        """Copy the state without its graph."""
        return self._map(Tensor.detach, lambda t: t)

    def to(self, device: torch.device | str) -> MemoryState:
        """Copy the state to another device; what a memory keeps on the host stays there."""
        new = self.clone()
        new.memories = {name: tree_to(tree, device) for name, tree in self.memories.items()}
        new.open = self.open.to(device)
        return new

    def select(self, rows: Tensor) -> MemoryState:
        """Take the rows of the given indices `(N,)`, in their order."""
        return self._map(
            lambda t: t.index_select(0, rows.to(t.device)),
            lambda t: t.index_select(0, rows.to(t.device)),
        )

    def repeat(self, times: int) -> MemoryState:
        """Repeat every row `times` times in a row, as beams are laid out."""
        return self.select(torch.arange(self.batch_size).repeat_interleave(times))

    @staticmethod
    def cat(states: list[MemoryState]) -> MemoryState:
        """Put the rows of several states of one model into one batch.

        Raises:
            ValueError: for an empty list or states of different models.
        """
        if not states:
            raise ValueError("MemoryState.cat got an empty list; it needs at least one state.")
        first = states[0]
        if any(s.signature != first.signature for s in states):
            raise ValueError("MemoryState.cat got states of different models.")
        for state in states:
            state.refuse_owed("joined")
        new = first.clone()
        new.memories = {
            name: tree_map(
                lambda *t: torch.cat(alike(*t)), *aligned(*[s.memories[name] for s in states])
            )
            for name in first.memories
        }
        new.open = OpenSegment.cat([s.open for s in states])
        new.chat = first.chat if len(states) == 1 else None
        for name in (*COUNTERS, "mask_hash"):
            setattr(new, name, torch.cat([getattr(s, name) for s in states]))
        if any(s.answer_from is not None for s in states):
            new.answer_from = torch.cat([s.answers for s in states])
        new.columns = max(s.columns for s in states)
        same = all(s.ids_hash is not None and s.columns == first.columns for s in states)
        new.ids_hash = torch.cat([s.ids_hash for s in states]) if same else None  # type: ignore[misc]
        return new

    # What has been read

    @property
    def answers(self) -> Tensor:
        """`answer_from`, with a number beyond every text where nothing was said."""
        known = self.answer_from
        return torch.full_like(self.tokens_seen, NEVER) if known is None else known

    def extend_hash(self, input_ids: Tensor | None, length: int) -> Tensor | None:
        """Compute the rolling hash after `input_ids` `(B, T)`; None once embeddings were fed."""
        if input_ids is None or self.ids_hash is None:
            return None
        power = pow(_HASH_BASE, self.columns + 1, 2**64)
        first = power - 2**64 if power >= 2**63 else power
        factors = torch.full((length,), _HASH_BASE, dtype=torch.long, device=input_ids.device)
        if length:
            factors[0] = first
        powers = torch.cumprod(factors, 0)
        mixed = (input_ids + 1) * 2654435761 + (input_ids + 1).square()
        return self.ids_hash.to(input_ids.device) + (mixed * powers).sum(1)

    @staticmethod
    def mask_hash_of(real: Tensor, before: int = 0) -> Tensor:
        """Compute what tells which of the columns `(B, T)`, after `before` others, are text."""
        place = torch.arange(before + 1, before + real.shape[1] + 1)
        return (real.long() * (place * 2654435761 + place.square() * 40503)).sum(1)

    def hash_after(self, input_ids: Tensor | None) -> Tensor | None:
        """Compute the rolling hash after `input_ids` `(B, T)`; the present one for None."""
        return (
            self.ids_hash if input_ids is None else self.extend_hash(input_ids, input_ids.shape[1])
        )

    def refuse_owed(self, action: str) -> None:
        """Refuse a state that was cropped and not read on.

        Raises:
            ValueError: says how many ids it owes.
        """
        if self.owed is not None:
            raise ValueError(
                f"The state was cropped and owes {self.owed.shape[1]} tokens: it can be {action} "
                "after the next call, which reads them."
            )

    # Size and files

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors the state holds."""
        tensors = [t for tree in self.memories.values() for _, t in tree_leaves(tree)]
        tensors += [t for _, t in tree_leaves(self.open.tree)]
        tensors += [self.open.positions, self.open.valid]
        return sum(t.numel() * t.element_size() for t in tensors)

    def save(self, path: str | Path) -> None:
        """Write the state to one safetensors file (through a temporary name).

        Raises:
            ValueError: if it holds numbers that are not finite, or owes tokens after a `crop`.
        """
        self.refuse_owed("saved")
        leaves = {f"open.{n}": t for n, t in tree_leaves(self.open.tree)}
        for name, tree in self.memories.items():
            leaves |= {f"memories.{name}.{n}": t for n, t in tree_leaves(tree)}
        rows = {name: getattr(self, name) for name in (*COUNTERS, "mask_hash")}
        rows |= {f"open_{name}": getattr(self.open, name) for name in COLUMNS}
        leaves |= {f"rows.{name}": tensor for name, tensor in rows.items()}
        known = {"ids_hash": self.ids_hash, "answer_from": self.answer_from}
        leaves |= {f"rows.{name}": t for name, t in known.items() if t is not None}
        tensors = {n: t.detach().cpu().contiguous().clone() for n, t in leaves.items()}
        check_finite(tensors, "The state", "it is not saved. Go back to an earlier one.")
        about = {
            "columns": self.columns, "noted": self.open.noted, "hold_open": self.hold_open,
            "signature": self.signature, "weights": self.weights,
            "memories": _count_tensors(self.memories), "chat": self.chat,
        }  # fmt: skip
        metadata = {"format": FORMAT, "version": str(VERSION), "about": json.dumps(about)}
        metadata |= checksums(tensors, about=metadata["about"])
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @classmethod
    def load(cls, path: str | Path, model: Any = None) -> MemoryState:
        """Read a state file.

        Args:
            path: written by `save`.
            model: a memwrap model to check against now (and to move the state to its
                device); without it the check happens when a model first meets the state.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: for a damaged or foreign file, another version, or another model.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"There is no state file {path}.")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                check_count(file.keys(), path)
                # Cloned: a file's tensors lie at odd addresses, where a matrix product may round
                # another way, and a loaded state continues bit for bit.
                tensors = {n: file.get_tensor(n).clone() for n in file.keys()}  # noqa: SIM118
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} is not a memwrap state (save one with state.save).")
            if metadata.get("version") != str(VERSION):
                raise ValueError(
                    f"{path} has state format {metadata.get('version')}; this memwrap reads "
                    f"{VERSION}. Read the document again with this version."
                )
            check_sums(tensors, metadata, path, needed=True)
            about = parse_json(metadata["about"], path)
            check_layout(about, tensors, path)
            state = cls._from_file(about, tensors)
            check_rows(state, path)
        except (SafetensorError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is damaged or not a state file: {error}") from error
        if model is not None:
            model.check_state(state)
            state = state.to(model.device)
        return state

    @classmethod
    def _from_file(cls, about: dict, tensors: dict[str, Tensor]) -> MemoryState:
        tree = tree_build(tensors)
        rows: dict[str, Tensor] = tree["rows"]
        # A memory may keep nothing, as a kNN-LM without a cache does.
        memories = {n: {} for n in about["memories"]} | tree.get("memories", {})
        if (counts := _count_tensors(memories)) != about["memories"]:
            wrong = [name for name in counts if counts[name] != about["memories"].get(name)]
            raise KeyError(f"the tensors of {wrong} are missing or foreign")
        state = cls(memories, rows["fill"].shape[0], about["signature"])
        positions, valid, read = (rows[f"open_{name}"] for name in COLUMNS)
        noted = bool(about["noted"])
        state.open = OpenSegment(tree.get("open", {}), positions, valid, read, noted)
        for name in (*COUNTERS, "mask_hash"):
            setattr(state, name, rows[name])
        state.ids_hash, state.answer_from = rows.get("ids_hash"), rows.get("answer_from")
        state.columns = int(about["columns"])
        state.hold_open = bool(about["hold_open"])
        state.weights = about["weights"]
        state.chat, state.unverified = about["chat"], True
        return state


def _count_tensors(memories: dict[str, Tree]) -> dict[str, int]:
    """Count the tensors that each memory keeps."""
    return {name: sum(1 for _ in tree_leaves(tree)) for name, tree in memories.items()}
