"""HMT: a hierarchical memory of sensory tokens, a segment's vector and a searched cache (He et
al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from memwrap.memories.config import MemoryConfig
from memwrap.memories.parts.matrices import matrix_of
from memwrap.memories.protocol import Bounds, SeesSegment, SegmentTokens, SoftPrompt
from memwrap.memories.registry import register
from memwrap.memories.settings import NonNegativeInt, PositiveInt, Range
from memwrap.memories.sizes import Sizes, memory_tokens
from memwrap.ops import accumulation_dtype
from memwrap.ops.buffers import filled, left_aligned
from memwrap.ops.cache_search import search_cache
from memwrap.state.progress import Progress
from memwrap.state.trees import Tree


class HMTConfig(MemoryConfig):
    """Hierarchical memory: each segment leaves one vector in a cache, and what opens a segment is
    recalled from that cache by a topic query; the last tokens of the segment before come along.

    Examples:
        >>> import memwrap
        >>> memwrap.HMTConfig(cache_size=100).num_sensory
        32

    Attributes:
        num_sensory: k, tokens of the segment before that are put in front of a segment.
        cache_size: N, past memory embeddings that can be recalled; the oldest go first.
        d_mem: width of recall queries and keys (`None`: that of the embeddings).
        summary_fraction: part of a segment that the topic is extracted from.
        recall: search the cache. Off is the method's stage 1: the last memory embedding opens the
            next segment, without topic extraction.
        write_token: what stands behind a segment and becomes its memory embedding: the
            `"recalled"` vector once more (paper) or the `"learned"` initial one.
    """

    name: ClassVar[str] = "hmt"

    num_sensory: NonNegativeInt = 32
    cache_size: PositiveInt = 300
    d_mem: PositiveInt | None = None
    summary_fraction: Annotated[float, Range(above=0, most=1)] = 0.5
    recall: bool = True
    write_token: Literal["recalled", "learned"] = "recalled"

    @classmethod
    def tiny(cls) -> HMTConfig:
        return cls(segment_size=8, num_sensory=3, cache_size=3, d_mem=8)


@register(HMTConfig)
class HMTMemory(SoftPrompt, SeesSegment):
    """`[P | sensory tokens | segment | P]`: P is recalled from the cache of past memory
    embeddings; the last hidden state at the end joins the cache (section 3)."""

    config: HMTConfig
    looks_at = frozenset({"embeds"})

    def __init__(self, config: HMTConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.num_prefix, self.num_suffix = 1 + config.num_sensory, 1
        self.tokens = memory_tokens(1, sizes)
        if not config.recall:
            return
        width = sizes.embedding_size
        make: dict[str, Any] = {"bias": False, "dtype": sizes.dtype, "device": sizes.device}
        self.summary = memory_tokens(1, sizes)
        self.query = nn.Linear(width, config.d_mem or width, **make)
        self.key = nn.Linear(width, config.d_mem or width, **make)

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        config, width = self.config, self.sizes.embedding_size
        make: dict[str, Any] = {"dtype": accumulation_dtype(self.tokens), "device": device}
        nothing = torch.zeros(batch_size, dtype=torch.long, device=device)
        state: Tree = {
            "prompt": self.tokens.to(device).expand(batch_size, -1, -1),
            "cache": torch.zeros(batch_size, config.cache_size, width, **make),
            "count": nothing,
            "weights": torch.zeros(batch_size, config.cache_size, **make),
        }
        if config.num_sensory:
            state["sensory"] = torch.zeros(batch_size, config.num_sensory, width, **make)
            state["num_sensory"] = nothing
        return state

    def ranges(self, state: Tree, progress: Progress) -> Iterator[Bounds]:
        yield state["count"], 0, self.config.cache_size
        if "num_sensory" in state:
            yield state["num_sensory"], 0, self.config.num_sensory

    def prefix(self, state: Tree) -> Tensor:
        if not self.config.num_sensory:
            return state["prompt"]
        return torch.cat([state["prompt"], state["sensory"]], 1)

    def prefix_mask(self, state: Tree) -> Tensor | None:
        if not self.config.num_sensory:
            return None
        return filled(1 + state["num_sensory"], self.num_prefix)

    def suffix(self, state: Tree) -> Tensor:
        if self.config.write_token == "recalled":
            return state["prompt"]
        return self.tokens.expand(state["prompt"].shape[0], -1, -1)

    def write_suffix(self, state: Tree, hidden: Tensor) -> Tree:
        cache, count = left_aligned.append(state["cache"], state["count"], hidden)
        new = {**state, "cache": cache, "count": count}
        if not self.config.recall:
            new["prompt"] = hidden.to(self.tokens.dtype)
        return new

    def write_segment(self, state: Tree, tokens: SegmentTokens) -> Tree:
        config, embeds = self.config, tokens.embeds
        if embeds is None:
            return state
        if config.num_sensory:
            size = config.num_sensory
            sensory, count = left_aligned.take_last(embeds, tokens.counted, size, size)
            state = {
                **state, "sensory": sensory.to(state["sensory"].dtype), "num_sensory": count,
            }  # fmt: skip
        if not config.recall:
            return state
        # A part of the segment as long as it was, and at least one token.
        lengths = tokens.valid.sum(1)
        part = torch.round(lengths.double() * config.summary_fraction).long().clamp(min=1)
        end, count = left_aligned.take_last(embeds, tokens.valid, part, int(part.max()))
        real = filled(count, end.shape[1])
        return self._searched(state, self.topic(end, real, real, tokens))

    def topic(
        self, embeds: Tensor, visible: Tensor, counted: Tensor, tokens: SegmentTokens
    ) -> Tensor:
        """Compute the topic query S `(B, D)` of some tokens: the last hidden state behind `[T |
        tokens | T]`, read by the backbone alone.

        Args:
            embeds: `(B, J, D)`.
            visible, counted: `(B, J)` bool, as in `SegmentTokens.run`.
            tokens: brings the backbone.
        """
        batch = embeds.shape[0]
        summary = self.summary.expand(batch, -1, -1).to(embeds.dtype)
        last = self.tokens if self.config.write_token == "learned" else self.summary
        end = last.expand(batch, -1, -1).to(embeds.dtype)
        edge = visible.new_ones(batch, 1)
        visible = torch.cat([edge, visible, edge], 1)
        counted = torch.cat([edge, counted, edge], 1)
        return tokens.run(torch.cat([summary, embeds, end], 1), visible, counted)[:, -1]

    def _searched(self, state: Tree, topic: Tensor) -> Tree:
        """Make the state whose next segment opens with what the topic finds in the cache."""
        count = state["count"]
        matrices = matrix_of(self.query), matrix_of(self.key)
        vector, weights = search_cache(topic, state["cache"], count, *matrices)
        prompt = torch.where((count > 0)[:, None], vector, self.tokens.to(vector.dtype))
        weights = weights.detach().to(state["weights"].dtype)
        return {**state, "prompt": prompt[:, None].to(self.tokens.dtype), "weights": weights}

    def cache_weights(self, state: Tree) -> list[Tensor]:
        """Give for each row the weights `(n,)` with which its n cached memory embeddings, oldest
        first, make up the vector that opens its next segment; zeros without a search."""
        pairs = zip(state["weights"], state["count"].tolist(), strict=True)
        return [weights[:count] for weights, count in pairs]
