"""Memory: what the engine calls, and what a memory may see of a segment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from memwrap.backbones.layer_attention import LayerAttention
from memwrap.memories.config import MemoryConfig
from memwrap.memories.sizes import Sizes
from memwrap.state.trees import Tree

# The branch that is read alone, of the memory with the identity.
_NONE: Mapping[int, str] = MappingProxyType({})
_branches: ContextVar[Mapping[int, str]] = ContextVar("memwrap_branches", default=_NONE)


@dataclass
class SegmentTokens:
    """A segment's tokens, for memories that look at them (`Memory.looks_at`).

    Attributes:
        embeds: `(B, N, D)` input embeddings; None where the memory does not look at them.
        hidden: `(B, N, D)` last hidden states; None as above, and where a segment opens.
        ffn: `(B, N, D)` what the last layer's feed-forward block was given; None as `hidden`.
        ids: `(B, N)` the tokens' ids, -1 for embeddings that are none of the vocabulary's; None as
            `hidden`.
        valid: `(B, N)` bool, on the CPU: the tokens of the row's segment.
        counted: `(B, N)` bool: columns that take up positions. `valid`, and with
            `count_padding` the padding too.
        run: the backbone alone, without any memory: embeddings `(B, K, D)`, which of them are
            visible and which take up positions (both `(B, K)` bool) -> last hidden states.
    """

    embeds: Tensor | None
    hidden: Tensor | None
    valid: Tensor
    counted: Tensor
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    ffn: Tensor | None = None
    ids: Tensor | None = None


class Memory(nn.Module):
    """The base of all memories. Implement the calls of the places named in the config.

    State is functional: every call returns new tensors and leaves those it was given alone.

    Attributes:
        num_prefix: most embeddings in front of a segment.
        num_suffix: embeddings behind it.
        looks_at: what `closed` needs of a segment's tokens, `"embeds"`, `"hidden"`, `"ffn"` or
            `"ids"`; it is kept beside the keys and values of an open segment.
        mixes_on: what `mix` is given of the tokens: `"hidden"` or `"ffn"`.
        zero_positions: on a backbone with a table of learned positions, prefix and suffix get
            a zero vector and the tokens count from 0.
        needs_hidden: keep the attention's inputs of the open segment (`LayerAttention.hidden`).
        within_window: what is kept is seen through a layer's own sliding window, where it has one:
            nothing older than that reaches the layer.
        bytes_per_token: at most so many bytes a token and row does the state grow by, for a
            memory whose config is not `bounded`.
        insert_every: a token is inserted after so many of a segment, and after the rest of them
            where it closes (0: none). It takes up a position, except on a backbone with a table
            of learned ones, where it has that of the token it follows.
        insert_id: the vocabulary's id of that token; None: its embedding is `inserted(state)`.
        insert_predicts: the inserted token predicts what follows it, and is a target of the token
            before it (needs an `insert_id`). Otherwise it is outside the loss.
        grows: the state's tensors may become longer in one dimension, filled from its beginning.
        branches: parts of what is read that can be read alone (`only`); an evaluation measures
            what each is worth.
    """

    looks_at: frozenset[str] = frozenset()
    mixes_on: str = "hidden"
    zero_positions: bool = False
    needs_hidden: bool = False
    within_window: bool = False
    bytes_per_token: float = 0.0
    grows: bool = False
    branches: tuple[str, ...] = ()

    def __init__(self, config: MemoryConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config = config
        self.sizes = sizes
        self.num_prefix = 0
        self.num_suffix = 0
        self.insert_every = 0
        self.insert_id: int | None = None
        self.insert_predicts = False

    @property
    def branch(self) -> str:
        """The branch that is read alone, or "both"."""
        return _branches.get().get(id(self), "both")

    @contextmanager
    def only(self, branch: str) -> Iterator[None]:
        """Read one of the `branches` alone inside the block (or "both"), in this thread.

        Raises:
            ValueError: for a branch that the memory does not have.
        """
        if branch not in (*self.branches, "both"):
            raise ValueError(
                f"`branch` is {branch!r}; {type(self).__name__} has {(*self.branches, 'both')}."
            )
        token = _branches.set({**_branches.get(), id(self): branch})
        try:
            yield
        finally:
            _branches.reset(token)

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        """The state of rows that have read nothing: a tree of tensors, batch first."""
        raise NotImplementedError

    def prefix(self, state: Tree) -> Tensor:
        """Embeddings before a segment, `(B, num_prefix, D)`."""
        raise NotImplementedError

    def prefix_mask(self, state: Tree) -> Tensor | None:
        """Which rows of the prefix are there, `(B, num_prefix)` bool; None for all. Others are
        seen by nobody and take up no position. It must not change while a segment is open."""
        return None

    def suffix(self, state: Tree) -> Tensor:
        """Embeddings after a segment, `(B, num_suffix, D)`."""
        raise NotImplementedError

    def inserted(self, state: Tree) -> Tensor:
        """The embedding of the tokens inserted in a segment, `(B, 1, D)`."""
        raise NotImplementedError

    def write(self, state: Tree, hidden: Tensor) -> Tree:
        """The state after a segment closed; `hidden` `(B, num_suffix, D)` are the decoder's
        last hidden states of the suffix."""
        return state

    def opened(self, state: Tree, tokens: SegmentTokens) -> Tree:
        """The state with which a segment opens, given those of its first tokens that are in the
        call. What is made of them depends on how text is fed, and is seen by earlier tokens."""
        return state

    def closed(self, state: Tree, tokens: SegmentTokens) -> Tree:
        """The state after `write`, given the tokens of the closed segment however they were
        fed. Called if the memory `looks_at` them."""
        return state

    # Layers and attention. A memory that keeps something for single layers has them in its state
    # as `{"layers": {"3": tree, ...}}`; it is called for these layers, with the layer's tree.

    def before_layer(self, layer: int, hidden: Tensor, state: Tree) -> Tensor:
        """What decoder layer `layer` is given instead of `hidden` `(B, T, D)`."""
        return hidden

    def after_layer(self, layer: int, hidden: Tensor, state: Tree) -> Tree:
        """The layer's state after `layer` gave `hidden` `(B, num_suffix, D)` at the suffix of a
        closing segment."""
        return state

    def attend(self, layer: int, attention: LayerAttention, state: Tree) -> tuple[Tensor, Tree]:
        """The attention's output `(B, T, H, Dv)` and the layer's state after the T tokens.

        Called for every step, also in the middle of a segment: what is counted there must not
        depend on how a segment is fed.
        """
        return attention.local(), state

    def close_layer(self, layer: int, attention: LayerAttention, state: Tree) -> Tree:
        """The layer's state after a segment closed; `attention` has all its keys and values
        (T may be 0). Rows whose segment stays open keep the state of `attend`."""
        return state

    def progress(self, done: float) -> None:
        """Told by the trainer before every step which share of its steps is done, 0 to 1."""

    # Logits

    def mix(self, logits: Tensor, hidden: Tensor, state: Tree) -> Tensor:
        """The logits that the model gives instead of its own.

        Args:
            logits: `(B, T, V)` float32.
            hidden: `(B, T, D)` what `mixes_on` names, of the same tokens.
            state: as the segment found it: what its own tokens wrote is not in it.
        """
        return logits

    # Files beside the parameters

    def save_files(self, folder: Path) -> None:
        """Write what is neither a parameter nor a setting into a saved model's folder."""

    def load_files(self, folder: Path) -> None:
        """Read what `save_files` wrote."""

    def figures(self) -> dict[str, Tensor]:
        """Learned numbers worth watching, `(layers, heads)` each: logged and plotted."""
        return {}

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Parameter groups with settings of their own; parameters not named get the default."""
        return []
