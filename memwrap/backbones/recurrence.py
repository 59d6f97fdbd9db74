"""A backbone's own recurrent layers (linear attention, state spaces, short convolutions).

What they remember travels from segment to segment as a part of the state: a text is one stream for
them, as without a memory. Their modules know no padding inside a row, and write their states in
place. So a recurrent module's dynamic subclass gives its parent nothing but tokens, rows of one
length at a time, and a cache of its own whose tensors are replaced, not written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.cache_utils import Cache, LinearAttentionLayer

from memwrap.backbones.cache_names import NAMES
from memwrap.backbones.class_swaps import lend, subclass
from memwrap.state.trees import Tree, tree_leaves, tree_map

# Layer types that remember more than keys and values; a "hybrid" layer attends, too.
KINDS = ("conv", "linear_attention", "hybrid")
KIND = "recurrent"
_MOST_STATES = 8  # of one kind in a layer
# Before 5.21, layers began anew or went astray where several tokens followed others.
SUPPORTED = hasattr(Cache, "get_conv_state")
Call = Callable[[Tensor, Cache], Any]


# No keyword of a run reaches a recurrent module; a nested run has another, or none.
_current: ContextVar[Recurrence | None] = ContextVar("memwrap_recurrence", default=None)


class _States(LinearAttentionLayer):
    """One layer's states: read from a tree, replaced by new tensors instead of written."""

    is_compileable = False

    def __init__(self, tree: Tree, like: Tensor) -> None:
        super().__init__(number_of_states=_MOST_STATES)
        # Copies: the step of a single token writes them in place.
        for index, value in tree.get("conv", {}).items():
            self.conv_states[int(index)] = value.to(like.device, like.dtype, copy=True)
            self.conv_kernel_size[int(index)] = value.shape[-1]
            self.is_conv_states_initialized[int(index)] = True
            self.has_previous_state[int(index)] = True
        for index, value in tree.get("recurrent", {}).items():
            self.recurrent_states[int(index)] = value.to(like.device, copy=True)
            self.is_recurrent_states_initialized[int(index)] = True
            self.has_previous_state[int(index)] = True

    def update_conv_state(
        self,
        conv_states: Tensor,
        state_idx: int = 0,
        conv_kernel_size: int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        old = self.conv_states[state_idx]
        size: int = conv_kernel_size or conv_states.shape[-1]
        full = conv_states
        if old is not None:
            size, full = old.shape[-1], torch.cat([old, conv_states], -1)
        elif full.shape[-1] < size:
            full = torch.nn.functional.pad(full, (size - full.shape[-1], 0))
        self.conv_states[state_idx] = full[..., -size:]
        self.conv_kernel_size[state_idx] = size
        self.is_conv_states_initialized[state_idx] = True
        self.has_previous_state[state_idx] = True
        return full

    def update_recurrent_state(
        self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: Any
    ) -> Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        self.has_previous_state[state_idx] = True
        return recurrent_states

    def before_it_is_written(self) -> AbstractContextManager[Any]:
        """Save for the backward pass, in the block, what states were before they are written."""
        states = [*self.conv_states.values(), *self.recurrent_states.values()]
        written = {t.untyped_storage().data_ptr() for t in states if t is not None}

        def kept(saved: Tensor) -> Tensor:
            return saved.clone() if saved.untyped_storage().data_ptr() in written else saved

        return saved_tensors_hooks(kept, lambda saved: saved)

    def tree(self) -> Tree:
        kinds = {"conv": self.conv_states, "recurrent": self.recurrent_states}
        trees = {
            kind: {str(i): t for i, t in states.items() if t is not None}
            for kind, states in kinds.items()
        }
        return {kind: states for kind, states in trees.items() if states}


@dataclass
class Recurrence:
    """One step of a backbone's recurrent layers, `carried` while it runs.

    Attributes:
        states: each layer's tree by its number, `{"3": {"conv": {"0": (B, ...)}, ...}}`; a layer
            that is not there has read nothing.
        valid: `(B, T)` bool, on the CPU: the step's columns that are there.
        after: the trees after the step.
    """

    states: Tree
    valid: Tensor
    after: Tree = field(default_factory=dict)

    def __post_init__(self) -> None:
        counts = self.valid.sum(1)
        self.whole = bool(self.valid.all())
        self._groups = []
        if not self.whole:
            for count in sorted(set(counts.tolist()) - {0}):
                rows = (counts == count).nonzero().squeeze(1)
                columns = self.valid[rows].nonzero()[:, 1].view(len(rows), count)
                self._groups.append((rows, columns))

    def check_met(self, count: int, name: str) -> None:
        """Refuse a model some of whose `count` recurrent layers ran without their states."""
        if len(self.after) != count:
            raise ValueError(
                f"{len(self.after)} of {name}'s {count} recurrent layers met their states: classes "
                "were changed after wrapping. Unwrap, change them, and wrap again."
            )

    def __call__(self, layer: int, call: Call, hidden: Tensor) -> Tensor:
        """Run the layer's module on `hidden` `(B, T, D)`; the output is 0 where there is no
        token."""
        tree = self.states.get(str(layer), {})
        if self.whole:
            out, self.after[str(layer)] = _run(call, hidden, tree, layer)
            return out
        result, after = torch.zeros_like(hidden), tree
        for rows, columns in self._groups:
            rows, columns = rows.to(hidden.device), columns.to(hidden.device)
            before = tree_map(lambda t, r=rows: t[r.to(t.device)], tree)
            out, new = _run(call, hidden[rows[:, None], columns], before, layer)
            result = result.index_put((rows[:, None], columns), out.to(result.dtype))
            after = _placed(after, rows, new, len(hidden))
        self.after[str(layer)] = after
        return result


def _run(call: Call, hidden: Tensor, tree: Tree, layer: int) -> tuple[Tensor, Tree]:
    states = _States(tree, hidden)
    writes = tree and hidden.shape[1] == 1 and torch.is_grad_enabled()
    with states.before_it_is_written() if writes else nullcontext():
        out = call(hidden, Cache(layers=[states] * (layer + 1)))
    return out, states.tree()


def _placed(tree: Tree, rows: Tensor, new: Tree, batch: int) -> Tree:
    """Put the states `new` of `rows` among those of all rows."""

    def put(value: Tensor, old: Tensor) -> Tensor:
        return old.to(value.device, value.dtype).index_copy(0, rows.to(value.device), value)

    if not tree:
        tree = tree_map(lambda t: t.new_zeros(batch, *t.shape[1:]), new)
    return tree_map(put, new, tree)


@cache
def _memory_recurrence(parent: type[nn.Module]) -> type[nn.Module]:
    taken = [name for name in inspect.signature(parent.forward).parameters if name != "self"]
    keyword = next((name for name in NAMES if name in taken), None)
    if keyword is None:
        raise ValueError(
            f"{parent.__name__} takes none of {', '.join(NAMES)}; memwrap cannot carry what it "
            "remembers from segment to segment."
        )

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        recurrence = _current.get()
        if recurrence is None:
            return parent.forward(self, *args, **kwargs)
        kwargs.update(zip(taken, args, strict=False))

        def call(hidden: Tensor, cache: Cache) -> Any:
            given = {**kwargs, taken[0]: hidden, keyword: cache}
            if "attention_mask" in given:
                given["attention_mask"] = None
            return parent.forward(self, **given)

        return recurrence(self.layer_idx, call, kwargs[taken[0]])

    return subclass(parent, KIND, forward=forward)


def recurrent_module(layer: nn.Module) -> nn.Module:
    """Find the module of a recurrent layer that keeps a state.

    Raises:
        ValueError: if there is none, or several.
    """
    modules = [m for m in layer.modules() if m is not layer and hasattr(m, "layer_idx")]
    modules = [m for m in modules if not hasattr(m, "is_causal")]
    if len(modules) != 1:
        raise ValueError(
            f"{type(layer).__name__} has {len(modules)} recurrent modules with a layer number; "
            "memwrap needs exactly one a layer."
        )
    return modules[0]


def attach(layers: list[nn.Module]) -> None:
    """Let recurrent layers carry their states."""
    for layer in layers:
        lend(recurrent_module(layer), KIND, _memory_recurrence)


@contextmanager
def carried(recurrence: Recurrence | None) -> Iterator[None]:
    """Let recurrent modules go on from the states of `recurrence` inside the block; None: they
    run as they are."""
    token = _current.set(recurrence)
    try:
        yield
    finally:
        _current.reset(token)


class Probe(Recurrence):
    """A run that learns what recurrent layers remember of a row of tokens, and whether they go on
    from it: in two pieces they must give what they give in one.

    Attributes:
        after: each layer's tree of `(1, ...)`.
        broken: the layers that do not go on.
    """

    TOKENS = 8

    def __init__(self) -> None:
        super().__init__({}, torch.ones(1, self.TOKENS, dtype=torch.bool))
        self.broken: list[int] = []

    def __call__(self, layer: int, call: Call, hidden: Tensor) -> Tensor:
        half, close = self.TOKENS // 2, 1e-3 if hidden.dtype.itemsize > 2 else 0.05
        out, whole = _run(call, hidden, {}, layer)
        first, tree = _run(call, hidden[:, :half], {}, layer)
        second, tree = _run(call, hidden[:, half:], tree, layer)
        pairs = [(out, torch.cat([first, second], 1))]
        both = zip(tree_leaves(whole), tree_leaves(tree), strict=True)
        pairs += [(a, b) for (_, a), (_, b) in both]
        # float32 leaves some 1e-6, bf16 0.01
        if any((a - b).abs().max() > close * a.abs().max().clamp_min(1e-6) for a, b in pairs):
            self.broken.append(layer)
        self.after[str(layer)] = whole
        return out

    def empty(self, count: int, name: str) -> Tree:
        """Make each layer's tree of zeros `(1, ...)`.

        Args:
            count: recurrent layers of the model.
            name: of the model, for errors.

        Raises:
            ValueError: if a layer did not meet its state, or does not go on from what it remembers.
        """
        self.check_met(count, name)
        if self.broken:
            raise ValueError(
                f"{name} does not go on from what its recurrent layers ({self.broken[0]} is the "
                "first) remember when several tokens are read at once; a newer transformers may."
            )
        return tree_map(torch.zeros_like, self.after)
