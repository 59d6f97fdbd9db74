"""AutoCompressor: segments become summary vectors, and those a soft prompt (Chevalier et al. 2023);
ICAE: the same, each segment by itself, for a reader that stays as it is (Ge et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from torch import Tensor

from memwrap.memories.config import MemoryConfig
from memwrap.memories.protocol import Bounds, Claims, SeesSegment, SegmentTokens, SoftPrompt
from memwrap.memories.registry import register
from memwrap.memories.settings import Fraction, PositiveInt
from memwrap.memories.sizes import Sizes, memory_tokens
from memwrap.ops import accumulation_dtype
from memwrap.ops.buffers import filled, left_aligned
from memwrap.state.memory_state import MemoryState
from memwrap.state.progress import Progress
from memwrap.state.trees import Tree


class AutoCompressorConfig(MemoryConfig):
    """Accumulated summary vectors: every segment adds some, all of them open the next.

    Examples:
        >>> import memwrap
        >>> memwrap.AutoCompressorConfig(segment_size=1024).num_memory_tokens
        50

    Attributes:
        num_memory_tokens: k, summary vectors a segment.
        memory_size: summary vectors that are kept at most; the oldest go first.
        accumulate: keep those of earlier segments. Off: only the last segment's (the paper's
            RMT baseline).
        independent: a segment is summarised in a pass of its own, without earlier summaries, as
            ICAE does.
        reader: `"frozen"`: the backbone reads without its adapters, which only make summaries
            (ICAE; needs `independent`). `"adapted"`: they are on in both.
        length_spread: as for all memories; the published value.
        zero_positions: on a backbone with a table of learned positions, summaries get a zero
            vector instead of one from the table and tokens count from 0. No effect on others.
        bptt_segments: gradients are stopped between windows of so many segments.
    """

    name: ClassVar[str] = "autocompressor"

    num_memory_tokens: PositiveInt = 50
    memory_size: PositiveInt = 1000
    accumulate: bool = True
    independent: bool = False
    reader: Literal["adapted", "frozen"] = "adapted"
    length_spread: Fraction = 1 / 3
    zero_positions: bool = True
    bptt_segments: PositiveInt | None = 2

    def validate_memory_size(self) -> None:
        if self.memory_size < self.num_memory_tokens:
            self.refuse("memory_size", f"at least num_memory_tokens ({self.num_memory_tokens})")

    def validate_reader(self) -> None:
        if self.reader == "frozen" and not self.independent:
            self.refuse("reader", '"adapted" without `independent`: one pass reads and summarises')

    @classmethod
    def tiny(cls) -> AutoCompressorConfig:
        # What holds for every memory is tested without chance and through all segments.
        return cls(
            segment_size=8, num_memory_tokens=2, memory_size=5, length_spread=0.0,
            bptt_segments=None,
        )  # fmt: skip


@register(AutoCompressorConfig)
class AutoCompressorMemory(SoftPrompt, SeesSegment):
    """`[summaries | segment | summary tokens]`: the last hidden states of the summary tokens join
    the summaries (section 3). With `independent` that is two passes, `[summaries | segment]` and,
    as a segment closes, `[segment | summary tokens]`."""

    claims = Claims(neutral_start=True)

    config: AutoCompressorConfig

    def __init__(self, config: AutoCompressorConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        count = config.num_memory_tokens
        self.num_suffix = 0 if config.independent else count
        self.num_prefix = config.memory_size if config.accumulate else count
        self.looks_at = frozenset(["embeds"] if config.independent else [])
        self.frozen_reader = config.reader == "frozen"
        self.zero_positions = config.zero_positions
        self.tokens = memory_tokens(config.num_memory_tokens, sizes)

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        dtype = accumulation_dtype(self.tokens)
        shape = (batch_size, self.num_prefix, self.sizes.embedding_size)
        return {
            "summaries": torch.zeros(shape, dtype=dtype, device=device),
            "count": torch.zeros(batch_size, dtype=torch.long, device=device),
        }

    def ranges(self, state: Tree, progress: Progress) -> Iterator[Bounds]:
        yield state["count"], 0, self.num_prefix

    def prefix(self, state: Tree) -> Tensor:
        return state["summaries"]

    def prefix_mask(self, state: Tree) -> Tensor:
        return filled(state["count"], self.num_prefix)

    def suffix(self, state: Tree) -> Tensor:
        return self.tokens[: self.num_suffix].expand(state["count"].shape[0], -1, -1)

    def write_suffix(self, state: Tree, hidden: Tensor) -> Tree:
        return state if self.config.independent else self._joined(state, hidden)

    def write_segment(self, state: Tree, tokens: SegmentTokens) -> Tree:
        embeds = tokens.embeds
        if embeds is None:
            return state
        end = self.tokens.expand(len(embeds), -1, -1).to(embeds)
        present = tokens.valid.new_ones(end.shape[:2])
        visible, counted = (torch.cat([x, present], 1) for x in (tokens.valid, tokens.counted))
        hidden = tokens.run(torch.cat([embeds, end], 1), visible, counted)
        return self._joined(state, hidden[:, -end.shape[1] :])

    def _joined(self, state: Tree, hidden: Tensor) -> Tree:
        """Put the newest summaries behind those that are kept."""
        before = state["count"] if self.config.accumulate else torch.zeros_like(state["count"])
        summaries, count = left_aligned.append(state["summaries"], before, hidden)
        return {"summaries": summaries, "count": count}

    # Summaries as soft prompts that are made once and used often

    def summaries(self, state: MemoryState) -> list[Tensor]:
        """Return the summary vectors `(n, D)` of each row of a state, oldest first."""
        tree = state.memories[self.config.name]
        pairs = zip(tree["summaries"], tree["count"].tolist(), strict=True)
        return [vectors[:count] for vectors, count in pairs]

    def prompt(self, vectors: Tensor) -> Tree:
        """Make the memory whose summaries are `vectors` `(B, n, D)`.

        Raises:
            ValueError: for more vectors than `memory_size`, or of another width.
        """
        empty = self.init_state(vectors.shape[0], vectors.device)
        places, width = empty["summaries"].shape[1:]
        if vectors.dim() != 3 or vectors.shape[1] > places or vectors.shape[2] != width:
            raise ValueError(
                f"The summaries have shape {tuple(vectors.shape)}; they must be (batch, at most "
                f"{places} (memory_size), {width})."
            )
        summaries, count = left_aligned.append(empty["summaries"], empty["count"], vectors)
        return {"summaries": summaries, "count": count}

    def combine(self, states: list[MemoryState]) -> MemoryState:
        """Join the summaries of several readings, in their order, to one state.

        Args:
            states: of this model, nothing open in them (`model.close_segment`), of as many rows.

        Raises:
            ValueError: for an empty list, open segments, states that do not belong together, or
                more summaries than `memory_size`.
        """
        if not states:
            raise ValueError("combine got an empty list; it needs at least one state.")
        first = states[0]
        if any(s.signature != first.signature or s.weights != first.weights for s in states):
            raise ValueError("combine got states of different models; read all with one.")
        if any(s.batch_size != first.batch_size for s in states):
            sizes = [s.batch_size for s in states]
            raise ValueError(f"combine got states of {sizes} rows; they must have as many.")
        if any(bool((s.fill > 0).any()) for s in states):
            raise ValueError("combine got a state with an open segment; model.close_segment first.")
        counts = torch.stack([s.memories[self.config.name]["count"] for s in states])
        if int(counts.sum(0).max()) > self.num_prefix:
            raise ValueError(
                f"combine got {int(counts.sum(0).max())} summaries in a row; `memory_size` is "
                f"{self.num_prefix}."
            )
        joined = [torch.cat(parts) for parts in zip(*map(self.summaries, states), strict=True)]
        trees = [self.prompt(vectors[None]) for vectors in joined]
        result = first.clone()
        name = self.config.name
        result.memories = {
            name: {key: torch.cat([tree[key] for tree in trees]) for key in trees[0]}
        }
        result.segments = torch.stack([s.segments for s in states]).sum(0)
        result.tokens_seen = torch.stack([s.tokens_seen for s in states]).sum(0)
        result.columns = sum(s.columns for s in states)
        result.ids_hash = None  # not the reading of any one text
        return result
