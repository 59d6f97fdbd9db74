"""Memory Decoder: a small decoder that learned a store, mixed at the logits (Cao et al. 2025)."""

from __future__ import annotations

from typing import Annotated, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memwrap.memories.config import MemoryConfig
from memwrap.memories.parts.small_decoder import DecoderShape, SmallDecoder
from memwrap.memories.protocol import LogitsMemory
from memwrap.memories.registry import register
from memwrap.memories.settings import PositiveInt, Range
from memwrap.memories.sizes import Sizes
from memwrap.ops.interpolation import interpolate_logits
from memwrap.state.trees import Tree


class MemoryDecoderConfig(MemoryConfig):
    """A small decoder reads along, and its distribution is mixed with the model's.

    Examples:
        >>> import memwrap
        >>> memwrap.MemoryDecoderConfig(num_layers=2).interpolation
        0.25

    Attributes:
        interpolation: lambda, the decoder's share.
        temperature: divides the decoder's logits.
        num_layers: of the decoder.
        hidden_size: width of its hidden states.
        num_heads: its query heads.
        num_kv_heads: its heads of keys and values.
        inner_size: width of its feed-forward blocks.
        window_size: tokens that a layer of it sees, the newest among them.
        rope_theta: base of its rotary embedding.
        norm_eps: of its norms.
    """

    name: ClassVar[str] = "memory_decoder"
    not_in_state: ClassVar[frozenset[str]] = frozenset({"interpolation", "temperature"})

    interpolation: Annotated[float, Range(0, 0.999)] = 0.25
    temperature: Annotated[float, Range(1e-3)] = 1.0
    num_layers: PositiveInt = 4
    hidden_size: PositiveInt = 256
    num_heads: PositiveInt = 8
    num_kv_heads: PositiveInt = 4
    inner_size: PositiveInt = 768
    window_size: PositiveInt = 512
    rope_theta: Annotated[float, Range(above=1)] = 10_000.0
    norm_eps: Annotated[float, Range(above=0)] = 1e-6

    def validate_heads(self) -> None:
        if self.hidden_size % (2 * self.num_heads):
            self.refuse("num_heads", f"so many that 2 num_heads divide {self.hidden_size}")

    def validate_groups(self) -> None:
        if self.num_heads % self.num_kv_heads:
            self.refuse("num_kv_heads", f"a divisor of num_heads ({self.num_heads})")

    @classmethod
    def tiny(cls) -> MemoryDecoderConfig:
        return cls(
            segment_size=8, interpolation=0.5, num_layers=2, hidden_size=16, num_heads=4,
            num_kv_heads=2, inner_size=24, window_size=12,
        )  # fmt: skip


@register(MemoryDecoderConfig)
class MemoryDecoderMemory(LogitsMemory):
    """A decoder that reads the same ids beside the backbone. What it knows is in its weights; its
    state are the keys and values of its window, and does not depend on where segments end."""

    key = "ids"

    config: MemoryDecoderConfig

    def __init__(self, config: MemoryDecoderConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        shape = DecoderShape(
            sizes.vocab_size, config.hidden_size, config.num_layers, config.num_heads,
            config.num_kv_heads, config.inner_size, config.window_size, config.rope_theta,
            config.norm_eps,
        )  # fmt: skip
        self.decoder = SmallDecoder(shape, sizes.dtype, sizes.device)

    def start_from(self, model: PreTrainedModel) -> None:
        """Begin training with the weights of a causal LM of the decoder's form: a published
        checkpoint, or the backbone's own layers, some of them.

        Raises:
            ValueError: if the model has another form, width or vocabulary.
        """
        self.decoder.take_over(model.get_decoder().state_dict())

    def resized(self, vocab_size: int) -> None:
        self.decoder.resize(vocab_size)

    def init_state(self, batch_size: int, device: torch.device) -> Tree:
        return self.decoder.empty(batch_size, device)

    def read_ids(self, ids: Tensor, state: Tree) -> tuple[Tensor, Tree]:
        with torch.autocast(ids.device.type, enabled=False):
            return self.decoder(ids, state)

    def mix(self, logits: Tensor, key: Tensor, state: Tree) -> Tensor:
        with torch.autocast(key.device.type, enabled=False):
            other = self.decoder.head(key)
        return interpolate_logits(logits, other, self.config.interpolation, self.config.temperature)
