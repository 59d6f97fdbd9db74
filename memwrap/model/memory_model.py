"""MemoryModelForCausalLM: the `PreTrainedModel` that a user holds."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from memwrap.backbones import Backbone
from memwrap.backbones.auto_classes import auto_class
from memwrap.backbones.backbone import ATTENTION_IMPLEMENTATIONS
from memwrap.backbones.cache_names import CACHE
from memwrap.backbones.expert_balance import OPTION, ExpertBalance
from memwrap.backbones.offloaded import loaded_parameters
from memwrap.engine.answering import marked
from memwrap.engine.inputs import (
    Inputs,
    check_control,
    check_fit,
    check_inputs,
    check_mask,
    refuse_unknown,
    with_targets,
)
from memwrap.engine.loop import Loop
from memwrap.engine.loss import Collect
from memwrap.engine.packed_documents import packed
from memwrap.engine.step import SegmentReader
from memwrap.io.fingerprints import fingerprint
from memwrap.memories.protocol import LogitsMemory, Memory
from memwrap.memories.registry import config_class
from memwrap.model.adapter_switches import adapter_keys, adapters_in_use
from memwrap.model.base_files import plain_name
from memwrap.model.building import build_memories
from memwrap.model.compaction import CompactionMixin
from memwrap.model.configuration import MemoryModelConfig
from memwrap.model.decoder import MemoryModules, SegmentDecoder
from memwrap.model.following import (
    balance_of,
    follow_casts,
    take_over_checkpointing,
    warn_of_training,
)
from memwrap.model.generation import MemoryGenerationMixin
from memwrap.model.memory_settings import MemorySettingsMixin
from memwrap.model.outputs import LaterLogits, MemoryModelOutput, one_cache
from memwrap.model.saving import SavingMixin
from memwrap.model.state_files import check_file_state
from memwrap.model.text_reading import ReadingMixin
from memwrap.state.check import signature_difference
from memwrap.state.memory_state import MemoryState
from memwrap.state.past import Recorded

MEMORY_CHILD = "memory_modules"


class MemoryModelForCausalLM(  # type: ignore[misc]
    ReadingMixin, SavingMixin, MemorySettingsMixin, CompactionMixin, MemoryGenerationMixin,
    PreTrainedModel,
):  # fmt: skip
    """A causal LM with memories: reads text of any length in bounded space.

    Make one with `memwrap.wrap` or `memwrap.load`.
    """

    config_class = MemoryModelConfig
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012

    def __init__(self, config: MemoryModelConfig, parts: Backbone | None = None) -> None:
        super().__init__(config)
        if parts is None:
            kind = auto_class(config.backbone)
            parts = Backbone(kind.from_config(copy.deepcopy(config.backbone)))
        self.parts = parts
        self.parts.check()
        self.memory_configs = [
            config_class(values["name"]).from_dict(values) for values in config.memories or []
        ]
        memories = build_memories(self.parts, self.memory_configs)
        # A base class may initialise what it has not seen initialised: nothing here is new to us.
        self.backbone = backbone = parts.model
        self.memory_modules = MemoryModules(memories)
        for module in self.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]
        self._attach()
        self.gradient_checkpointing = take_over_checkpointing(backbone)
        self.generation_config = copy.deepcopy(backbone.generation_config)
        self.post_init()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a copy, or of a pickle in a process that was spawned
        self._attach()

    def _attach(self) -> None:
        self.parts.attach(SegmentReader(self.parts, self.memories).attachment_points)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Choose how the backbone computes attention, memories included: "sdpa" or "eager"."""
        if attn_implementation not in ATTENTION_IMPLEMENTATIONS:
            raise ValueError(
                f"`attn_implementation` is {attn_implementation!r}; segments need explicit masks: "
                f"allowed: {', '.join(ATTENTION_IMPLEMENTATIONS)}."
            )
        self.parts.detach()
        self.backbone.set_attn_implementation(attn_implementation, *args, **kwargs)
        self._attach()

    # Parts

    @property
    def memories(self) -> dict[str, Memory]:
        """The memory modules by name (the trained copies where PEFT made any)."""
        return self.memory_modules.by_name()

    @property
    def device(self) -> torch.device:
        """Where text is taken in."""
        return self.parts.device

    @property
    def segment_size(self) -> int:
        return self.memory_configs[0].segment_size

    @property
    def base_model(self) -> Any:
        """The loop, giving last hidden states: for trainers that bring their own head and loss."""
        return SegmentDecoder(self) if "memory_modules" in self._modules else self

    def memory_parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over the parameters of all memories."""
        for memory in self.memories.values():
            yield from memory.parameters()

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.backbone.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        return self.parts.decoder

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:  # type: ignore[override]
        result = self.backbone.resize_token_embeddings(*args, **kwargs)
        self.config.backbone = copy.deepcopy(self.backbone.config)
        self.memory_modules.resized(self.parts.embedding_weight.shape[0])
        return result

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: the backbone brings its weights, the memories initialise their own."""

    def _set_gradient_checkpointing(self, enable: bool = True, *args: Any, **kwargs: Any) -> None:
        # Whole segments are recomputed; a layer's own checkpoint would drop the open segment.
        self.gradient_checkpointing = enable

    # States

    def signature(self) -> dict[str, Any]:
        """Tell which states this model can continue: its memories, its backbone's shape, and the
        adapters in use."""
        config = self.parts.config
        names = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")
        return {
            "memories": [c.signature() for c in self.memory_configs],
            "backbone": {name: getattr(config, name) for name in names}
            | {"dtype": str(self.parts.embedding_weight.dtype).removeprefix("torch.")},
            "adapters": adapters_in_use(self) if self.adapters() else [],
        }

    def fingerprint(self) -> dict[str, str]:
        """Hash the backbone's and the memories' weights, adapters that are not in use left out."""
        idle = adapter_keys(self.backbone, idle=True) if self.adapters() else set()
        memories = {n: m.named_parameters() for n, m in self.memories.items()}
        weights = ((f"{n}.{k}", p) for n, ps in memories.items() for k, p in ps)
        kept = ((k, p) for k, p in loaded_parameters(self.backbone) if k not in idle)
        base = ((plain_name(k), p) for k, p in kept)
        return {"backbone": fingerprint(base), "memories": fingerprint(weights)}

    def new_state(self, batch_size: int) -> MemoryState:
        """Make the state of `batch_size` rows that have read nothing."""
        follow_casts(self)
        reader = SegmentReader(self.parts, self.memories)
        return MemoryState(
            reader.init_states(batch_size, self.device), batch_size, self.signature()
        )

    def check_state(self, state: MemoryState) -> None:
        """Refuse a state of another model.

        Raises:
            ValueError: says what differs.
        """
        if not isinstance(state, MemoryState):
            raise ValueError(
                f"`cache` is a {type(state).__name__}; give a MemoryState (model.read)."
            )
        signature = self.signature()
        if state.signature != signature:
            difference = signature_difference(state.signature, signature)
            raise ValueError(f"The state belongs to another model: {difference}.")
        if state.unverified:
            check_file_state(self, state)
            state.unverified = False

    def loop(self, balance: ExpertBalance | None = None) -> Loop:
        """Make the segment loop over this model's backbone and memories; losses have `balance`
        beside them, where it is given."""
        follow_casts(self)
        training = self.training or self.backbone.training
        if training and take_over_checkpointing(self.backbone):  # turned on after wrapping
            self.gradient_checkpointing = True
        if self.training:
            warn_of_training(self)
        checkpointing = self.gradient_checkpointing and self.training
        reader = SegmentReader(self.parts, self.memories, balance)
        return Loop(reader, self.memory_configs[0], checkpointing, self.training)

    def _advanced(self, state: MemoryState, new: MemoryState) -> MemoryState:
        """Move `state` on to `new`, all at once; a first reading notes the weights."""
        if new.weights is None and not (torch.is_grad_enabled() or self.training):
            new.weights = self.fingerprint()
        state._become(new)
        return state

    # Calls

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: MemoryState | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        memory_control: str | MemoryState | None = None,
        return_logits: bool | None = None,
        remember: bool = True,
        seq_idx: Tensor | None = None,
        return_dict: bool | None = None,
        past_key_values: MemoryState | None = None,
        **kwargs: Any,
    ) -> MemoryModelOutput | tuple:
        """Read text of any length.

        Args:
            input_ids: `(B, T)` new tokens; they continue `cache`.
            attention_mask: `(B, T)`, or longer by the columns that `cache` has read, with which
                it must agree; padding may stand before and after a row's tokens.
            position_ids: `(B, T)`. Where they do not go on by one a new document begins, which
                is read as if it had a row alone; otherwise they are ignored, as positions restart
                in every segment. Collators' `cu_seq_lens_q` do the same.
            cache: the state to continue (also as `past_key_values`). It moves on in place, at the
                end.
            inputs_embeds: `(B, T, D)` instead of `input_ids`.
            labels: `(B, T)`, shifted inside; -100 is ignored.
            use_cache: return a state. Default: not while training with labels.
            logits_to_keep: the last so many columns, or a tensor of columns; 0 for all.
            num_items_in_batch: divides the summed loss instead of the number of targets.
            memory_control: for evaluation, what is read instead of the memory: `"off"` (an empty
                one), `"shuffled"` (the next row's), or a state. Needs closed segments.
            return_logits: with labels, logits take another reading. True (or `logits_to_keep`)
                makes them; False makes none; by default they are made in evaluation, when they are
                first looked at.
            remember: False leaves the last segment open however long it grows.
            seq_idx: `(B, T)`, a number for each document of a packed row.
            shift_labels: `(B, T)`, the id each column predicts, instead of `labels`. Taken from
                the keywords: transformers' Trainer takes every named "label" for a needed one.
            teacher: a `Teacher` whose distribution is followed beside the labels (a keyword).
            output_router_logits: with labels, whether the loss has the backbone's own part that
                balances experts: of each step's text, with the weight in the backbone's config,
                which also says the default (a keyword).
            answer_from: `(B,)` number of each row's first token that is part of an answer; the
                state keeps it. Default: the first label behind ignored ones (a keyword).

        Returns:
            `loss`, `logits` `(B, T, V)` (zeros at padding) or None, and `cache`, the state.

        Raises:
            ValueError: for misshapen inputs, a mask with a hole or one that contradicts the
                state, a state of another model, or packed documents with a state.
        """
        names = ("shift_labels", "teacher", "cu_seq_lens_q", "answer_from")
        shift_labels, teacher, ends, first_answer = (kwargs.pop(name, None) for name in names)
        asked = kwargs.pop(OPTION, None) if labels is not None or shift_labels is not None else None
        refuse_unknown(kwargs, type(self).forward)
        given = one_cache(cache, past_key_values)
        if getattr(given, "record_past", False) and input_ids is not None:
            input_ids, attention_mask = self._ahead(
                given, input_ids, attention_mask, logits_to_keep
            )
            position_ids = None  # they cover what was just read, too
        inputs = self._inputs(input_ids, inputs_embeds, attention_mask)
        inputs = packed(inputs, seq_idx, position_ids, ends)
        inputs = with_targets(inputs, labels, shift_labels, teacher)
        learning = inputs.targets is not None
        if use_cache is None:
            use_cache = inputs.rows is None and not (learning and self.training)
        state = marked(self._state_of(given, inputs, attention_mask, not remember), first_answer)
        self._check_control(memory_control, state, inputs)
        loop = self.loop(balance_of(self, asked, learning))
        first = None if learning else inputs.first_column(logits_to_keep)
        reading = loop(
            inputs, state, hidden_from=first, collect=self._collected,
            keep_open=use_cache or given is not None, control=memory_control,
        )  # fmt: skip
        before = (inputs, state.clone() if learning else state, logits_to_keep, memory_control)
        fields: dict[str, Any] = {CACHE: None}
        if given is not None or use_cache:
            if state.record_past:
                reading.state.recorded = Recorded.after(state, inputs.ids)
            fields[CACHE] = self._advanced(given or state, reading.state)
        if not learning:
            logits = self._logits(reading.hidden, logits_to_keep)  # type: ignore[arg-type]
            out = MemoryModelOutput(logits=logits, **fields)
        else:
            count = num_items_in_batch if num_items_in_batch is not None else reading.targets
            fields["loss"] = reading.loss_sum / _at_least_one(count, inputs.device)
            again = partial(self._logits_again, loop, *before)
            if return_logits or not isinstance(logits_to_keep, int) or logits_to_keep:
                out = MemoryModelOutput(logits=again(), **fields)
            else:
                later = return_logits is None and not self.training
                out = LaterLogits(again, **fields) if later else MemoryModelOutput(**fields)
        return out.to_tuple() if return_dict is False else out

    @torch.no_grad()
    def _logits_again(
        self, loop: Loop, inputs: Inputs, state: MemoryState, keep: int | Tensor, control: Any
    ) -> Tensor:
        """Compute logits beside a loss: the text is read once more, without a graph."""
        again = loop(
            inputs, state, hidden_from=inputs.first_column(keep), collect=self._collected,
            keep_open=False, control=control,
        )  # fmt: skip
        return self._logits(again.hidden, keep)  # type: ignore[arg-type]

    def _check_control(self, control: Any, state: MemoryState, inputs: Inputs) -> None:
        if isinstance(control, MemoryState):
            self.check_state(control)
        check_control(control, state, inputs)

    def _inputs(self, ids: Tensor | None, embeds: Tensor | None, mask: Tensor | None) -> Inputs:
        inputs = check_inputs(ids, embeds, mask)
        check_fit(inputs, *self.parts.embedding_weight.shape)
        return inputs

    def _state_of(
        self, given: MemoryState | None, inputs: Inputs, mask: Tensor | None, hold_open: bool
    ) -> MemoryState:
        """Check the state to continue, or make a fresh one; and the mask against it."""
        if given is None:
            state = self.new_state(inputs.shape[0])
            state.hold_open = hold_open
            if mask is not None:
                check_mask(mask, inputs.shape[1], state)
            return state
        self.check_state(given)
        if given.batch_size != inputs.shape[0]:
            raise ValueError(
                f"The state has {given.batch_size} rows, the input {inputs.shape[0]}; they must "
                "agree (state.repeat, state.select)."
            )
        state = self._settled(given)
        if mask is not None:
            check_mask(mask, inputs.shape[1], state)
        if state.hold_open != hold_open:
            state = state.clone()
            state.hold_open = hold_open
        return state

    @property
    def _collected(self) -> Collect:
        """What the loop collects: logits where a memory mixes them, hidden states otherwise."""
        mixed = any(isinstance(m, LogitsMemory) for m in self.memories.values())
        return Collect.LOGITS if mixed else Collect.HIDDEN

    def _logits(self, hidden: Tensor, keep: int | Tensor) -> Tensor:
        if isinstance(keep, Tensor):
            hidden = hidden[:, keep] if keep.dim() == 1 else hidden[keep.bool()][None]
        return hidden if self._collected is Collect.LOGITS else self.parts.head(hidden)


def _at_least_one(count: Tensor | int, device: torch.device) -> Tensor:
    return torch.as_tensor(count, device=device).clamp(min=1)
