"""What a memory is: a module without a state of its own, attached at places that are base classes.

    place            reads                              writes as a segment closes
    SoftPrompt       prefix, prefix_mask, suffix        write_suffix
    LayerMemory      read_layer                         write_layer
    AttentionMemory  attend                             write_attention
    LogitsMemory     mix, read_ids
    SeesSegment                                         write_segment
    InsertsTokens    inserted

State is functional: every call returns new tensors and leaves those it was given alone. What a
memory keeps for single layers stands in its state as `{"layers": {"3": tree, ...}}`; it is called
for these layers, with the layer's tree.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memwrap.backbones.layer_attention import LayerAttention
from memwrap.memories.config import MemoryConfig
from memwrap.memories.sizes import Sizes
from memwrap.state.progress import Progress
from memwrap.state.trees import Tree


@dataclass(frozen=True)
class Claims:
    """The promises of a memory; the invariants hold it to them.

    Attributes:
        neutral_start: untrained, it gives what the base gives of a text that fits in a segment's
            reach: what it adds begins at zero.
        bounded: the state does not grow with the text.
        lengthens: it keeps entries of the text, in tensors that become longer in dimension 2,
            filled from its beginning; what is read twice is kept twice. Those of one part
            (`memwrap.state.trees.part_of`) are equally long.
        linearizes: it takes the place of the attention (`memwrap.linearize`).
        whole: settings with which it reads 128 tokens as the base does; empty: there are none.
    """

    neutral_start: bool = False
    bounded: bool = True
    lengthens: bool = False
    linearizes: bool = False
    whole: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Insertion:
    """Tokens that are put among a segment's own.

    Attributes:
        every: one after so many tokens of a segment, and one after the rest where it closes. It
            takes up a position, except on a backbone with a table of learned ones, where it has
            that of the token it follows.
        id: of the vocabulary; None: the embedding is the memory's own (`inserted`).
        in_loss: it predicts what follows it, and is a target of the token before it (needs an
            `id`). Otherwise it is outside the loss.
    """

    every: int
    id: int | None = None
    in_loss: bool = False


Bounds = tuple[Tensor, int | Tensor, int | Tensor]
"""Whole numbers `(B, ...)`, and the least and the most that they may be."""

# The branch that is read alone, and in what share of the rows, of the memory with the identity.
_NONE: Mapping[int, tuple[str, float]] = MappingProxyType({})
_branches: ContextVar[Mapping[int, tuple[str, float]]] = ContextVar(
    "memwrap_branches", default=_NONE
)


@dataclass
class SegmentTokens:
    """The tokens of a segment that closed, for memories that look at them.

    Attributes:
        embeds: `(B, N, D)` input embeddings; None where the memory does not look at them.
        hidden: `(B, N, D)` last hidden states; None as above.
        valid: `(B, N)` bool, on the CPU: the tokens of the row's segment.
        counted: `(B, N)` bool: columns that take up positions. `valid`, and with
            `count_padding` the padding too.
        run: the backbone alone, without any memory: embeddings `(B, K, D)`, which of them are
            visible and which take up positions (both `(B, K)` bool) -> last hidden states.
        ffn: `(B, N, D)` what the last layer's feed-forward block was given; None as `hidden`.
        ids: `(B, N)` the tokens' ids, -1 where there is none; None as `hidden`.
    """

    embeds: Tensor | None
    hidden: Tensor | None
    valid: Tensor
    counted: Tensor
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    ffn: Tensor | None = None
    ids: Tensor | None = None


class Memory(nn.Module):
    """The base of all memories; derive from the places where yours attaches.

    Args:
        config, sizes: its settings, checked, and what it may know of the backbone.

    Attributes:
        claims: what the invariants hold it to.
        bytes_per_token: at most so many bytes a token and row does the state grow by; 0 if it is
            bounded.
        takes_store: it searches a store of vectors, which a caller of `load` may name.
        branches: parts of what is read that can be read alone (`only`), as evaluation does.
        draws_branches: in training it can read a branch alone in a share of the rows.
        widens: names of tensors that become longer in dimension 2 and have some length in a fresh
            state; those that are empty there need no name.
        sums: tensors of a layer's tree that segments are summed in, `(B, heads, ...)`, the first of
            them `(B, heads, K, V)`; its config is a `SummedConfig` (`parts.sums`).
    """

    claims: ClassVar[Claims] = Claims()
    bytes_per_token: float = 0.0
    takes_store: ClassVar[bool] = False
    branches: ClassVar[tuple[str, ...]] = ()
    draws_branches: ClassVar[bool] = False
    widens: ClassVar[tuple[str, ...]] = ()
    sums: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: MemoryConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config = config
        self.sizes = sizes

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__ != __name__:  # the places below are what is checked against
            _check_names(cls)

    @property
    def branch(self) -> str:
        """The branch that all rows read alone, or "both"."""
        branch, share = self.drawn_branch
        return branch if share == 1 else "both"

    @property
    def drawn_branch(self) -> tuple[str, float]:
        """The branch that some rows read alone, or "both", and the share of the rows."""
        return _branches.get().get(id(self), ("both", 1.0))

    @contextmanager
    def only(self, branch: str, share: float = 1.0) -> Iterator[None]:
        """Read one of the `branches` alone inside the block (or "both"), in this thread.

        Args:
            branch: its name.
            share: of the rows, drawn anew at each read; less than all of them in training alone.

        Raises:
            ValueError: for a branch that the memory does not have, or a share that it cannot draw.
        """
        if branch not in (*self.branches, "both"):
            raise ValueError(
                f"`branch` is {branch!r}; {type(self).__name__} has {(*self.branches, 'both')}."
            )
        if share != 1 and not self.draws_branches:
            raise ValueError(
                f"{type(self).__name__} reads a branch alone in every row; `share` must be 1."
            )
        token = _branches.set({**_branches.get(), id(self): (branch, share)})
        try:
            yield
        finally:
            _branches.reset(token)

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        """Make the state of rows that have read nothing: a tree of tensors, batch first."""
        raise NotImplementedError

    def ranges(self, state: Tree, progress: Progress) -> Iterator[Bounds]:
        """Say what the whole numbers in a state may be: one that comes from a file is refused if
        they are not.

        Args:
            state: of this memory; its names, shapes and dtypes are right.
            progress: how much the rows have read.

        Yields:
            A tensor `(B, ...)` and the least and the most it may hold, numbers or `(B,)`.
        """
        yield from ()

    def sums_before(self, layer: int) -> Tree:
        """Return the `sums` of a row before its first segment that are not zero there."""
        return {}

    def resettled(self, changed: set[str]) -> None:
        """Follow `changed` fields that no state depends on (`model.memory_settings`)."""

    def resized(self, vocab_size: int) -> None:
        """Follow embeddings of the backbone that have `vocab_size` rows now."""

    def open_named(self, config: MemoryConfig) -> None:
        """Open what the caller of `wrap` names in a config. A loaded model's config opens nothing:
        somebody else may have written it."""

    def save_files(self, new: Path, folder: Path) -> dict[str, str]:
        """Write what is neither a parameter nor a setting.

        Args:
            new: an empty folder; what is in it takes its place in `folder`, all at once.
            folder: the saved model's.

        Returns:
            Names and what tells each from another of that name, for `load_files`.
        """
        return {}

    def load_files(self, folder: Path, marks: dict[str, str] | None, store: Any) -> None:
        """Read what `save_files` wrote.

        Args:
            folder: the saved model's.
            marks: what `save_files` returned; None where that was not kept.
            store: what the caller named instead; False for no store (`takes_store`).
        """

    def figures(self) -> dict[str, Tensor]:
        """Return learned numbers worth watching, `(layers, heads)` each: logged and plotted."""
        return {}

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Return parameter groups with an own `lr`, `weight_decay` or `lr_scale` (times `lr`)."""
        return []


class SoftPrompt(Memory):
    """A place: vectors in front of a segment and behind it.

    Attributes:
        num_prefix: most embeddings in front of a segment.
        num_suffix: embeddings behind it.
        zero_positions: on a backbone with a table of learned positions, prefix and suffix get a
            zero vector and the tokens count from 0.
    """

    num_prefix: int = 0
    num_suffix: int = 0
    zero_positions: bool = False

    def prefix(self, state: Tree) -> Tensor:
        """Make the embeddings in front of a segment, `(B, num_prefix, D)`."""
        raise NotImplementedError

    def prefix_mask(self, state: Tree) -> Tensor | None:
        """Tell which vectors of the prefix exist, `(B, num_prefix)` bool; None for all. Others are
        seen by nobody and take up no position. It must not change while a segment is open."""
        return None

    def suffix(self, state: Tree) -> Tensor:
        """Make the embeddings behind a segment, `(B, num_suffix, D)`."""
        raise NotImplementedError

    def write_suffix(self, state: Tree, hidden: Tensor) -> Tree:
        """Write the state as a segment closes; `hidden` `(B, num_suffix, D)` are the last hidden
        states of the memory's own suffix."""
        return state

    def start_tokens(self, embeds: Tensor) -> None:
        """Begin training with a text's embeddings `(num_suffix, D)` as the suffix, or refuse."""
        raise ValueError(f"{self.config.name!r} has no memory tokens that a text could begin.")


class LayerMemory(Memory):
    """A place: the input of decoder layers, and their outputs at the memory's own suffix.

    Attributes:
        suffix_reads: what `read_layer` makes of its input reaches the memory's own suffix too.
    """

    suffix_reads: bool = True

    def read_layer(self, layer: int, hidden: Tensor, state: Tree) -> Tensor:
        """Compute what decoder layer `layer` is given instead of `hidden` `(B, T, D)`."""
        return hidden

    def write_layer(self, layer: int, hidden: Tensor, state: Tree) -> Tree:
        """Write the layer's state as a segment closes; `hidden` `(B, num_suffix, D)` is the layer's
        output at the memory's own suffix."""
        return state

    def start_layer(self, layer: int, hidden: Tensor, worth: Tensor) -> None:
        """Begin training from what the layer gives at the suffix, `(N, num_suffix, D)` of N
        segments; `worth` `(N,)` bool: they hold what is to be remembered."""


class AttentionMemory(Memory):
    """A place: the attention of decoder layers. One memory of a model can have it.

    Attributes:
        needs_hidden: keep the attention's inputs of the open segment (`LayerAttention.hidden`).
        within_window: what is kept is seen through a layer's own sliding window, where it has
            one: nothing older than that reaches the layer.
        tells_answers: it reads tokens of an answer another way (`LayerAttention.answers`).
        counts_positions: it rotates by places beyond a segment's: of the text, or of its entries.
        reaches: the farthest place at which it rotates, where it does so beyond a segment's.
    """

    needs_hidden: bool = False
    within_window: bool = False
    counts_positions: bool = False
    reaches: int = 0
    tells_answers: bool = False

    def attend(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        """Compute the attention's output `(B, T, H, Dv)` and the layer's state after the T tokens.

        Called for every step, also in the middle of a segment: what is counted there must not
        depend on how a segment is fed.
        """
        return attention.local(), state

    def write_attention(self, layer: int, attention: LayerAttention, state: Tree) -> Tree:
        """Write the layer's state as a segment closes; `attention` has all its keys and values (T
        may be 0). Rows whose segment stays open keep the state of `attend`."""
        return state


class LogitsMemory(Memory):
    """A place: the logits. One memory of a model can have it.

    Attributes:
        key: what `mix` is given of the tokens: `"hidden"`, the last hidden states, `"ffn"`, what
            the last layer's feed-forward block was given, or `"ids"`, what `read_ids` makes of
            their ids.
    """

    key: str = "hidden"

    def read_ids(self, ids: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        """Read the tokens' ids `(B, T)`, -1 where there is none, with the `key` "ids".

        Called for every step, also in the middle of a segment: what is made of a token must not
        depend on how a segment is fed.

        Returns:
            What `mix` is given of the tokens, `(B, T, D)`, and the state behind them.
        """
        raise NotImplementedError

    def mix(self, logits: Tensor, key: Tensor, state: Tree) -> Tensor:
        """Mix the logits that the model gives instead of its own.

        Args:
            logits: `(B, T, V)` float32.
            key: `(B, T, D)` of the same tokens; D is the memory's own with the `key` "ids".
            state: as the segment found it: what its own tokens wrote is not in it.
        """
        return logits


class SeesSegment(Memory):
    """A place: the tokens of a segment that closed, however they were fed.

    Attributes:
        looks_at: what it needs of them, `"embeds"`, `"hidden"`, `"ffn"` or `"ids"`; kept beside
            the keys and values of an open segment.
        frozen_reader: the backbone's adapters are off while segments are read, and on in the
            memory's own passes (`SegmentTokens.run`).
    """

    looks_at: frozenset[str] = frozenset()
    frozen_reader: bool = False

    def write_segment(self, state: Tree, tokens: SegmentTokens) -> Tree:
        """Write the state behind `write_suffix`, from the closed segment's tokens."""
        return state


class InsertsTokens(Memory):
    """A place: tokens among a segment's own. One memory of a model can have it, and none beside
    it may put a prefix in front of the segment, whose blocks are counted from its first position.
    """

    insertion: Insertion

    def inserted(self, state: Tree) -> Tensor:
        """Make the embedding of the inserted tokens, `(B, 1, D)`, where they have no id."""
        raise NotImplementedError


PLACES: dict[str, type[Memory]] = {
    "prompt": SoftPrompt,
    "layer": LayerMemory,
    "attention": AttentionMemory,
    "logits": LogitsMemory,
    "segment": SeesSegment,
    "inserted": InsertsTokens,
}


def places_of(memory: type[Memory]) -> list[str]:
    """Name the places where a memory attaches."""
    return [name for name, place in PLACES.items() if issubclass(memory, place)]


# Hooks and attributes by the place that they belong to; and what a memory may set.
_BASES: tuple[type[Memory], ...] = (Memory, *PLACES.values())
_HOOKS: dict[str, type[Memory]] = {
    name: place for place in _BASES for name in vars(place) if not name.startswith("_")
}
_ATTRIBUTES = {name for place in _BASES for name in place.__annotations__}


def _check_names(cls: type[Memory]) -> None:
    """Refuse a hook of a place that the class does not derive from, and names that look like a
    misspelt hook or attribute.

    Raises:
        TypeError: names it, and the nearest.
    """
    for name, value in vars(cls).items():
        if name.startswith("_") or name.isupper():
            continue
        place = _HOOKS.get(name)
        if place is not None and not issubclass(cls, place):
            raise TypeError(
                f"{cls.__name__}.{name} belongs to {place.__name__}, which the class does not "
                f"derive from: it would never be called. Derive from {place.__name__} too."
            )
        if name in _ATTRIBUTES or any(name in vars(base) for base in cls.__mro__[1:]):
            continue
        near = difflib.get_close_matches(name, [*_HOOKS, *_ATTRIBUTES], n=1, cutoff=0.8)
        plain = not callable(value) and not isinstance(value, (property, classmethod, staticmethod))
        if near or plain:
            hint = f"did you mean `{near[0]}`?" if near else "set it in __init__."
            raise TypeError(f"{cls.__name__}.{name} is no attribute of a memory; {hint}")
