"""What `generate` needs beyond transformers: states that are kept whole, shared and continued."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from memwrap.backbones.cache_names import CACHE
from memwrap.engine.inputs import check_inputs
from memwrap.model.outputs import one_cache
from memwrap.state.memory_state import MemoryState


class MemoryGenerationMixin(GenerationMixin):
    """`generate` of transformers over a `MemoryState`."""

    def _prepare_cache_for_generation(  # type: ignore[override]
        self,
        generation_config: Any,
        model_kwargs: dict,
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} has no meaning "
                "here: a memwrap model keeps its own MemoryState. Leave it out."
            )
        given = model_kwargs.get(CACHE)
        if given is not None and not isinstance(given, MemoryState):
            raise ValueError(
                f"`cache` is a {type(given).__name__}; give a MemoryState (model.read)."
            )
        if given is None and generation_config.use_cache is not False:
            names = ("num_beams", "num_return_sequences")
            rows = batch_size * max(getattr(generation_config, n, None) or 1 for n in names)
            model_kwargs[CACHE] = self.new_state(rows)  # type: ignore[attr-defined]

    @torch.no_grad()
    def generate(
        self,
        inputs: Tensor | None = None,
        *args: Any,
        cache: MemoryState | None = None,
        past_key_values: MemoryState | None = None,
        remember: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Generate as transformers does.

        Examples:
            >>> import memwrap, torch
            >>> model = memwrap.load("armt-lm")
            >>> state = model.read([list(range(300))])
            >>> question = torch.tensor([[5, 6, 7]])
            >>> model.generate(question, cache=state, max_new_tokens=4).shape
            torch.Size([1, 7])
            >>> state.tokens_seen  # ask again: the state is as it was
            tensor([300])

        Args:
            inputs: `(B, T)` new ids (also as `input_ids`). The full ids, those read into the
                state included, are recognised and not read twice.
            cache: a state to continue. It stays as it is, so that many questions can be asked of
                one reading; the continued state comes as `.cache` with
                `return_dict_in_generate=True`. One row serves a batch of questions.
            past_key_values: another name of `cache`.
            remember: write full segments while generating. False leaves the last segment open
                however long it grows, as the published code does.

        Raises:
            ValueError: for right-padded prompts and other caches.
        """
        given = one_cache(cache, past_key_values)
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        mask = kwargs.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(
                "The prompts are padded on the right; generate continues the last column. Tokenize "
                "with padding_side='left'."
            )
        if given is not None:
            fed = ids if ids is not None else kwargs.get("inputs_embeds")
            if fed is None:
                raise ValueError("Give at least one new token id with the state to continue.")
            state = self._state_for(given, fed.shape[0], kwargs)
            if not _holds(state, ids):
                new = mask if mask is not None else fed.new_ones(fed.shape[:2], dtype=torch.long)
                # Assisted decoding cuts a mask to the ids it knows, from the end.
                if new.shape[1] == fed.shape[1] and not self._drafts(kwargs):
                    seen = new.new_ones(new.shape[0], state.get_seq_length())
                    kwargs["attention_mask"] = torch.cat([seen, new], 1)
            kwargs[CACHE] = state
        if not remember:
            kwargs["remember"] = False
        out = super().generate(inputs, *args, **kwargs)
        final = getattr(out, CACHE, None)
        if isinstance(final, MemoryState) and not self._setting(kwargs, "is_assistant"):
            final._become(self._settled(final))
            final.record_past, final.recorded = False, None
        if CACHE != "cache" and hasattr(out, CACHE):
            out.cache = getattr(out, CACHE)
        return out

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        state: Any = kwargs.get(CACHE)
        begins = next_sequence_length is None and isinstance(state, MemoryState)
        if begins and _holds(state, input_ids):
            # Assisted decoding begins with all ids, also with those that the state has read.
            next_sequence_length = input_ids.shape[1] - state.get_seq_length()
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, **kwargs
        )

    def _setting(self, kwargs: dict, name: str) -> Any:
        """Look a setting of generation up where transformers does."""
        config = kwargs.get("generation_config") or self.generation_config
        return kwargs.get(name) or getattr(config, name, None)

    def _drafts(self, kwargs: dict) -> bool:
        """Tell whether decoding is assisted: tokens are drafted, and some taken back."""
        names = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
        return any(self._setting(kwargs, name) for name in names)

    def _settled(self, state: MemoryState) -> MemoryState:
        """Read what a cropped state owes; other states are given back as they are."""
        if state.owed is None:
            return state
        before = state.clone()
        before.owed = None
        inputs = check_inputs(state.owed.to(self.device), None, None)  # type: ignore[attr-defined]
        return self.loop()(inputs, before).state  # type: ignore[attr-defined]

    def _read_ahead(self, state: MemoryState, ids: Tensor, mask: Any, keep: Any) -> Tensor:
        """Read the columns of `ids` `(B, T)` before those whose logits are wanted, so that these
        alone are recorded; give the rest."""
        early = ids.shape[1] - keep if isinstance(keep, int) and keep > 0 else 0
        if early <= 0:
            return ids
        mask = None if mask is None else mask[:, : mask.shape[1] - keep]
        self(ids[:, :early], attention_mask=mask, **{CACHE: state}, logits_to_keep=1)  # type: ignore[operator]
        state.crop(0)
        return ids[:, early:]

    def _state_for(self, given: MemoryState, batch: int, kwargs: dict) -> MemoryState:
        """Copy the given state, with a row for every sequence that will be generated."""
        self.check_state(given)  # type: ignore[attr-defined]
        state = given.to(self.device)  # type: ignore[attr-defined]
        if state.batch_size == 1 and batch > 1:
            state = state.repeat(batch)
        if state.batch_size != batch:
            raise ValueError(
                f"The state has {state.batch_size} rows, the prompt {batch}; they must agree, or "
                "the state have one row."
            )
        rows = max(self._setting(kwargs, n) or 1 for n in ("num_beams", "num_return_sequences"))
        return state.repeat(rows) if rows > 1 else state


def _holds(state: MemoryState, ids: Tensor | None) -> bool:
    """Tell whether `ids` begin with exactly what the state has read."""
    if ids is None or state.ids_hash is None or not 0 < state.columns < ids.shape[1]:
        return False
    repeat = state.batch_size // ids.shape[0]
    fresh = MemoryState({}, ids.shape[0])
    read = fresh.extend_hash(ids[:, : state.columns], state.columns)
    return torch.equal(state.ids_hash[::repeat].cpu(), read.cpu())  # type: ignore[union-attr]
