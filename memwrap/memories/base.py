"""What every memory is: a config that validates itself, a module, and a tree of state."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from memwrap.backbones.attention import LayerAttention
from memwrap.backbones.probing import AttentionSizes
from memwrap.trees import Tree

ALIGNMENTS = ("left", "right", "center")


@dataclass(kw_only=True)
class MemoryConfig:
    """Fields that all memories share. Subclass it with the fields of one method.

    Attributes:
        segment_size: tokens that are read at once; the memory is written when so many are full.
        bptt_segments: gradients flow through at most so many segments (`None`: all). A
            sequence is cut into windows of that many segments.
        loss_on: `"all"` tokens, or only the `"last"` segment of each row.
        alignment: where a call's tokens are cut: from the `"left"`, from the `"right"` (the
            first segment is the short one), or in `"center"` (nearly equal lengths). Only
            "left" gives the same result however the tokens are fed.
        count_padding: cut by columns and let padding inside a segment take up positions, as
            published code does. Off: a row gives the same alone and padded in a batch.
    """

    name: ClassVar[str] = ""
    places: ClassVar[frozenset[str]] = frozenset()
    neutral_start: ClassVar[bool] = False
    bounded: ClassVar[bool] = True
    linearizes: ClassVar[bool] = False

    segment_size: int = 512
    bptt_segments: int | None = None
    loss_on: str = "all"
    alignment: str = "left"
    count_padding: bool = False

    def __post_init__(self) -> None:
        self._positive("segment_size")
        self._positive("bptt_segments", optional=True)
        self._one_of("loss_on", ("all", "last"))
        self._one_of("alignment", ALIGNMENTS)
        for entry in fields(self):
            if entry.type == "bool" and not isinstance(getattr(self, entry.name), bool):
                self._fail(entry.name, "true or false")

    def detach_before(self, segment: int) -> bool:
        """Whether gradients are cut between segment `segment - 1` and `segment` of a call."""
        return self.bptt_segments is not None and segment % self.bptt_segments == 0

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict with the memory's `name`."""
        return {"name": self.name, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MemoryConfig:
        """Build from a dict (its `name` may be left out).

        Raises:
            ValueError: for an unknown key; suggests the nearest.
        """
        values = dict(values)
        name = values.pop("name", cls.name)
        if name != cls.name:
            raise ValueError(f"{cls.__name__} got the settings of {name!r}; it needs {cls.name!r}.")
        known = [entry.name for entry in fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean `{near[0]}`?" if near else f"allowed: {', '.join(known)}."
                raise ValueError(f"{cls.__name__} has no field `{key}`; {hint}")
        return cls(**values)

    @classmethod
    def tiny(cls) -> MemoryConfig:
        """A small configuration, as the tests of every memory use it."""
        return cls(segment_size=8)

    @property
    def extra_tokens(self) -> int:
        """Positions of a learned table that a segment takes beyond its tokens."""
        return 0

    def draw_lengths(self, total: int) -> list[int] | None:
        """Segment lengths of `total` tokens in training, drawn with torch's generator.

        They sum to `total`; as many tokens as fit whole segments are drawn, the rest stays last.
        `None`: cut as in evaluation.
        """
        return None

    def _fail(self, name: str, allowed: str) -> None:
        raise ValueError(
            f"{type(self).__name__}.{name} is {getattr(self, name)!r}; it must be {allowed}."
        )

    def _layers(self, name: str = "layers") -> None:
        value = getattr(self, name)
        if value is None:
            return
        if (
            not isinstance(value, list)
            or not value
            or any(type(i) is not int or i < 0 for i in value)
        ):
            self._fail(name, "None or a list of layer numbers from 0")
        if len(set(value)) != len(value):
            self._fail(name, "a list without repetitions")

    def _positive(self, name: str, *, optional: bool = False, zero: bool = False) -> None:
        value = getattr(self, name)
        if optional and value is None:
            return
        least = 0 if zero else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            self._fail(name, f"an integer of at least {least}" + (" or None" if optional else ""))

    def _number(self, name: str, least: float, most: float = math.inf) -> None:
        value = getattr(self, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not least <= value <= most
        ):
            limits = f"from {least:g} to {most:g}" if most < math.inf else f"of at least {least:g}"
            self._fail(name, f"a number {limits}")

    def _one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            self._fail(name, "one of " + ", ".join(map(repr, allowed)))


@dataclass(frozen=True)
class Sizes:
    """What a memory may know of the backbone it is built for.

    Attributes:
        hidden_size: width D of the hidden states between layers.
        embedding_size: width of input embeddings and of the decoder's last hidden state.
        num_layers: decoder layers.
        embedding_std: standard deviation of the input embedding weights.
        dtype: dtype of the memory's parameters.
        backbone_dtype: dtype of the backbone, in which it keeps keys and values.
        embedding_mean: mean `(D,)` of all ids' embeddings, as the backbone embeds them.
        vocab_size: rows of the input embeddings.
        device: device of the memory's parameters.
        attention: heads and widths of attention by layer, for memories at that place. Recurrent
            layers have none.
    """

    hidden_size: int
    embedding_size: int
    num_layers: int
    embedding_std: float
    dtype: torch.dtype = torch.float32
    backbone_dtype: torch.dtype = torch.float32
    embedding_mean: Tensor | None = None
    vocab_size: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    attention: dict[int, AttentionSizes] = field(default_factory=dict)


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
        branches: parts of what is read that can be read alone, by setting `branch` to one of
            them; an evaluation measures what each is worth.
    """

    looks_at: frozenset[str] = frozenset()
    mixes_on: str = "hidden"
    zero_positions: bool = False
    needs_hidden: bool = False
    within_window: bool = False
    bytes_per_token: float = 0.0
    grows: bool = False
    branches: tuple[str, ...] = ()
    branch: str = "both"

    def __init__(self, config: MemoryConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config = config
        self.sizes = sizes
        self.num_prefix = 0
        self.num_suffix = 0
        self.insert_every = 0
        self.insert_id: int | None = None
        self.insert_predicts = False

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


def chosen_layers(config: Any, sizes: Sizes) -> list[int]:
    """The layers that `config.layers` names; for None all of them, at the attention place all with
    attention.

    Raises:
        ValueError: for a layer that the backbone does not have, or that has no attention.
    """
    attending = "attention" in config.places
    if config.layers is None:
        return list(sizes.attention if attending else range(sizes.num_layers))
    if max(config.layers) >= sizes.num_layers:
        raise ValueError(
            f"{type(config).__name__}.layers names layer {max(config.layers)}; the backbone has "
            f"layers 0 to {sizes.num_layers - 1}."
        )
    if attending:
        check_attention(config, "layers", config.layers, sizes)
    return sorted(config.layers)


def check_attention(config: Any, name: str, layers: Collection[int], sizes: Sizes) -> None:
    """Refuse layers, given in the field `name`, that have no attention.

    Raises:
        ValueError: names them, and those that have.
    """
    without = sorted(set(layers) - set(sizes.attention))
    if without:
        raise ValueError(
            f"{type(config).__name__}.{name} names layers without attention, {without}; the "
            f"backbone has some in {sorted(sizes.attention)}."
        )


def three_quarters(sizes: Sizes) -> int:
    """The first layer with attention from three quarters of the depth on (else the last), where
    methods with one memory layer have it."""
    late = [layer for layer in sizes.attention if layer >= 3 * sizes.num_layers // 4]
    return late[0] if late else max(sizes.attention)


def memory_tokens(count: int, sizes: Sizes) -> nn.Parameter:
    """Learned tokens `(count, D)`, drawn at the scale of the input embeddings."""
    tokens = torch.empty(count, sizes.embedding_size, dtype=sizes.dtype, device=sizes.device)
    scale = sizes.embedding_std if math.isfinite(sizes.embedding_std) else 0.02
    return nn.Parameter(nn.init.normal_(tokens, std=scale or 0.02))
