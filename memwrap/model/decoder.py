"""Two small things a memory model is made of: its memories' home, and a decoder for trainers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPast

from memwrap.engine.inputs import check_inputs, refuse_unknown
from memwrap.engine.packed_documents import packed
from memwrap.memories.protocol import LogitsMemory, Memory
from memwrap.model.following import warn_of_balance

if TYPE_CHECKING:
    from memwrap.model.memory_model import MemoryModelForCausalLM


class MemoryModules(nn.Module):
    """The holder of every memory parameter: the one child that PEFT trains and saves whole."""

    def __init__(self, memories: dict[str, Memory]) -> None:
        super().__init__()
        for name, memory in memories.items():
            self.add_module(name, memory)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Cast and move parameters, which are never narrower than float32: as in a model that was
        wrapped after its base was cast."""

        def kept(tensor: Tensor) -> Tensor:
            new: Tensor = fn(tensor)
            wide = torch.promote_types(new.dtype, torch.float32)
            if not tensor.is_floating_point() or new.dtype == wide:
                return new
            return tensor.to(new.device, wide)

        return super()._apply(kept, recurse)

    def resized(self, vocab_size: int) -> None:
        """Let the memories follow embeddings that have `vocab_size` rows now."""
        for memory in self.by_name().values():
            memory.resized(vocab_size)

    def by_name(self) -> dict[str, Memory]:
        return dict(self.named_children())  # type: ignore[arg-type]


class SegmentDecoder:
    """The decoder for tools that look for a `base_model`: last hidden states of a text of any
    length."""

    def __init__(self, model: MemoryModelForCausalLM) -> None:
        self._model = model

    def __call__(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        model = self._model
        refuse_unknown(kwargs, type(self).__call__)
        for name, memory in model.memories.items():
            if isinstance(memory, LogitsMemory):
                raise ValueError(
                    f"{name!r} changes the logits, which a trainer with its own head and loss "
                    "(TRL's) would leave out; train with transformers' Trainer or memwrap's."
                )
        if any(kwargs.get(name) is not None for name in ("cache", "past_key_values")):
            raise ValueError("`base_model` begins with nothing read; give a cache to the model.")
        warn_of_balance(model)
        inputs = check_inputs(input_ids, inputs_embeds, attention_mask)
        state = model.new_state(inputs.shape[0])
        inputs = packed(inputs, seq_idx, position_ids, cu_seq_lens_q)
        reading = model.loop()(inputs, state, hidden_from=0, keep_open=False)
        return BaseModelOutputWithPast(last_hidden_state=reading.hidden)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_model"].backbone.base_model, name)
