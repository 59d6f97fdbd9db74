"""What `generate` needs beyond transformers: states that are kept whole, shared and continued."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation.stopping_criteria import StoppingCriteriaList

from memwrap.backbones.cache_names import CACHE
from memwrap.engine.answering import marked
from memwrap.engine.inputs import check_inputs, check_mask, refuse_pictures
from memwrap.model.known_name import KnownName
from memwrap.model.outputs import one_cache
from memwrap.state.memory_state import MemoryState


class RowEnds(StoppingCriteriaList):
    """The criteria of one call that also note which rows have ended, and so read nothing more.

    Attributes:
        reads: `(B,)` bool, which rows' newest token is text; None before the first one.
    """

    def __init__(self, criteria: StoppingCriteriaList) -> None:
        super().__init__(criteria)
        # Only then are the tokens of ended rows replaced by padding.
        self.pads = any(hasattr(criterion, "eos_token_id") for criterion in criteria)
        self.reads: Tensor | None = None
        self._ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        ends: Tensor = super().__call__(input_ids, scores, **kwargs)
        if self._ended is None:
            self._ended = torch.zeros_like(ends)
        self.reads = ~self._ended
        self._ended = self._ended | ends
        return ends


class MemoryGenerationMixin(KnownName, GenerationMixin):
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
            _refuse_cache(generation_config.cache_implementation)
        given = model_kwargs.get(CACHE)
        if given is not None and not isinstance(given, MemoryState):
            raise ValueError(
                f"`cache` is a {type(given).__name__}; give a MemoryState (model.read)."
            )
        if given is not None and generation_config.use_cache is False:
            raise ValueError(
                "use_cache=False reads the whole prompt again for every token, which would put it "
                "into the given state each time. Leave it out, or give no state."
            )
        names = ("num_beams", "num_return_sequences")
        times = max(getattr(generation_config, n, None) or 1 for n in names)
        if given is not None:
            model_kwargs[CACHE] = given.repeat(times) if times > 1 else given
        elif generation_config.use_cache is not False:
            model_kwargs[CACHE] = self.new_state(batch_size * times)  # type: ignore[attr-defined]

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        position_ids: Tensor | None = None,
        row_ends: RowEnds | None = None,
        answer_from: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Collect what one call of the model in `generate` reads: the new columns and their mask.

        Positions are left out: they restart in every segment. So are labels, which Seq2SeqTrainer
        hands on (`predict_with_generate`).
        """
        kwargs.pop("labels", None)
        # Embeddings cannot be compared with what the state has read: all of them are new.
        embeds = inputs_embeds if is_first_iteration else None
        new = input_ids if embeds is None else embeds
        state: Any = kwargs.get(CACHE)
        if embeds is None and next_sequence_length is None and isinstance(state, MemoryState):
            # Assisted decoding begins with all ids, also with those that the state has read.
            seen = state.columns if _holds(state, input_ids) else 0
            next_sequence_length = input_ids.shape[1] - seen
        if embeds is None and next_sequence_length is not None:
            new = new[:, -next_sequence_length:]
        if attention_mask is not None:
            attention_mask = attention_mask[:, -new.shape[1] :]
        if row_ends is not None and row_ends.pads and row_ends.reads is not None:
            ended = ~row_ends.reads
            if kwargs.get(CACHE) is not None and bool(ended.any()):
                mask = new.new_ones(new.shape[:2]) if attention_mask is None else attention_mask
                attention_mask = mask.masked_fill(ended[:, None].to(mask.device), 0)
        name = "input_ids" if embeds is None else "inputs_embeds"
        given = {**kwargs, name: new, "attention_mask": attention_mask}
        if answer_from is not None:
            given["answer_from"] = answer_from
        return {
            k: v.to(self.device) if isinstance(v, Tensor) else v  # type: ignore[attr-defined]
            for k, v in given.items()
        }

    def _sample(  # type: ignore[override]
        self, input_ids: Any, *, stopping_criteria: StoppingCriteriaList, **kwargs: Any
    ) -> Any:
        ends, parent = RowEnds(stopping_criteria), cast(Any, super())
        return parent._sample(input_ids, stopping_criteria=ends, row_ends=ends, **kwargs)

    def _beam_search(  # type: ignore[override]
        self: Any, input_ids: Any, *, generation_config: Any, **kwargs: Any
    ) -> Any:
        """Search as transformers does; the state it returns is that of the sequences it returns,
        which are read again for it (that of the beams themselves is another)."""
        first, times = kwargs.get(CACHE), generation_config.num_beams
        first = None if first is None else first.clone()
        remember, begins = kwargs.get("remember", True), kwargs.get("answer_from")
        embeds, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        out: Any = cast(Any, super())._beam_search(
            input_ids, generation_config=generation_config, **kwargs
        )
        if not generation_config.return_dict_in_generate or first is None:
            return out
        rows = torch.arange(0, len(input_ids), times)
        rows = rows.repeat_interleave(generation_config.num_return_sequences)
        state = marked(first.select(rows), None if begins is None else begins[rows])
        answer = out.sequences[:, input_ids.shape[1] :]
        prompt = out.sequences[:, : input_ids.shape[1]]
        real = (out.beam_indices >= 0).long()
        if mask is not None:
            mask = mask[rows.to(mask.device)]
        with torch.no_grad():
            if embeds is not None:
                embeds = embeds[rows.to(embeds.device)]
                state = self._read_on(state, mask, remember, inputs_embeds=embeds)
            elif prompt.shape[1] > (read := self._columns_read(state, prompt, mask)):
                state = self._read_on(state, mask, remember, input_ids=prompt[:, read:])
            if answer.shape[1] > 1:
                state = self._read_on(state, real[:, :-1], remember, input_ids=answer[:, :-1])
        out[CACHE] = state
        return out

    @staticmethod
    def _columns_read(state: MemoryState, prompt: Tensor, mask: Tensor | None) -> int:
        """Count the columns of a prompt that lie in the state already, by the mask's length."""
        whole = mask is None or mask.shape[1] == prompt.shape[1]
        return state.columns if whole and _holds(state, prompt) else 0

    def _read_on(
        self, state: MemoryState, mask: Tensor | None, remember: bool, **new: Tensor
    ) -> MemoryState:
        total = next(iter(new.values())).shape[1]
        given = {
            **new, CACHE: state, "remember": remember, "logits_to_keep": 1,
            "attention_mask": None if mask is None else mask[:, -total:],
        }  # fmt: skip
        return self(**given)[CACHE]  # type: ignore[operator]

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse continuous batching: its paged cache has no place for a memory.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "Continuous batching keeps a paged cache of its own, in which a memwrap model cannot "
            "remember; use generate, with as many rows as fit and one state."
        )

    generate_batch = init_continuous_batching
    continuous_batching_context_manager = init_continuous_batching
    destroy_cached_continuous_batching_manager = init_continuous_batching

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
            ValueError: for right-padded prompts, other caches, pictures or sound, and drafts of the
                first layers alone.
        """
        refuse_pictures(kwargs)
        if self._setting(kwargs, "assistant_early_exit"):
            raise ValueError(
                "`assistant_early_exit` drafts with the first layers alone, past the memory; draft "
                "with `prompt_lookup_num_tokens` or an `assistant_model`."
            )
        given = one_cache(cache, past_key_values)
        ids = inputs if inputs is not None else kwargs.get("input_ids")
        mask = kwargs.get("attention_mask")
        if kwargs.get("cache_implementation") is not None:
            _refuse_cache(kwargs["cache_implementation"])
        if mask is not None and not bool(mask[:, -1].all()):
            raise ValueError(
                "The prompts are padded on the right; generate continues the last column. Tokenize "
                "with padding_side='left'."
            )
        if given is not None:
            fed = ids if ids is not None else kwargs.get("inputs_embeds")
            if fed is None:
                raise ValueError("Give at least one new token id with the state to continue.")
            state = self._state_for(given, fed.shape[0])
            kwargs["attention_mask"] = self._whole_mask(state, ids, fed, kwargs)
            kwargs[CACHE] = state
        if not remember:
            kwargs["remember"] = False
        if any(getattr(m, "tells_answers", False) for m in self.memories.values()):  # type: ignore[attr-defined]
            kwargs.setdefault("answer_from", _behind(ids, kwargs))
        out = super().generate(inputs, *args, **kwargs)
        final = getattr(out, CACHE, None)
        if isinstance(final, MemoryState) and not self._setting(kwargs, "is_assistant"):
            final._become(self._settled(final))
            final.record_past, final.recorded = False, None
        if CACHE != "cache" and hasattr(out, CACHE):
            out.cache = getattr(out, CACHE)
        return out

    def _whole_mask(
        self, state: MemoryState, ids: Tensor | None, fed: Tensor, kwargs: dict
    ) -> Tensor | None:
        """Make the mask `(B, columns read and new)` by which transformers tells new columns from
        those that were read.

        Raises:
            ValueError: if the mask contradicts what was read, or none was given where padding was
                read.
        """
        mask = kwargs.get("attention_mask")
        held = _holds(state, ids)
        new = fed.shape[1] - (state.columns if held else 0)
        padded = held and bool((state.tokens_seen < state.columns).any())
        if mask is None and padded:
            mask = torch.ne(fed, self._pad(kwargs)).long()
            if bool((state.mask_hash_of(mask[:, : state.columns].cpu()) != state.mask_hash).any()):
                raise ValueError(
                    "The state was read from rows with padding; give `attention_mask` with their "
                    "whole ids, or the new ids alone."
                )
        if not held and self._drafts(kwargs):
            return mask  # assisted decoding cuts it to the ids it knows, from the end
        if mask is None:
            mask = fed.new_ones(len(fed), new, dtype=torch.long)
        check_mask(mask, new, state)
        seen = mask.new_ones(len(mask), state.columns + new - mask.shape[1])
        return torch.cat([seen, mask], 1)

    def _pad(self, kwargs: dict) -> int:
        pad = self._setting(kwargs, "pad_token_id")
        return -1 if pad is None else pad

    def _setting(self, kwargs: dict, name: str) -> Any:
        """Look a setting of generation up where transformers does."""
        config = kwargs.get("generation_config") or self.generation_config
        given = kwargs.get(name)
        return getattr(config, name, None) if given is None else given

    def _drafts(self, kwargs: dict) -> bool:
        """Tell whether decoding is assisted: tokens are drafted, and some taken back."""
        names = ("assistant_model", "prompt_lookup_num_tokens")
        return any(self._setting(kwargs, name) for name in names)

    def _settled(self, state: MemoryState) -> MemoryState:
        """Read what a cropped state owes; other states are given back as they are."""
        if state.owed is None:
            return state
        before = state.clone()
        before.owed = None
        inputs = check_inputs(state.owed.to(self.device), None, None)  # type: ignore[attr-defined]
        return self.loop()(inputs, before).state  # type: ignore[attr-defined]

    def _ahead(self, state: MemoryState, ids: Tensor, mask: Any, keep: Any) -> tuple[Tensor, Any]:
        """Read the columns of `ids` `(B, T)` before those whose logits are wanted, so that these
        alone are recorded; give the rest, and the mask of it."""
        early = ids.shape[1] - keep if isinstance(keep, int) and keep > 0 else 0
        if early > 0:
            before = None if mask is None else mask[:, : mask.shape[1] - keep]
            self(ids[:, :early], attention_mask=before, **{CACHE: state}, logits_to_keep=1)  # type: ignore[operator]
            state.crop(0)
            ids = ids[:, early:]
        return ids, mask if mask is None else mask[:, -ids.shape[1] :]

    def _state_for(self, given: MemoryState, batch: int) -> MemoryState:
        """Copy the given state, with a row for every prompt."""
        self.check_state(given)  # type: ignore[attr-defined]
        state = self._settled(given.to(self.device))  # type: ignore[attr-defined]
        if state.batch_size == 1 and batch > 1:
            state = state.repeat(batch)
        if state.batch_size != batch:
            raise ValueError(
                f"The state has {state.batch_size} rows, the prompt {batch}; they must agree, or "
                "the state have one row."
            )
        return state


def _refuse_cache(name: Any) -> None:
    raise ValueError(
        f"cache_implementation={name!r} has no meaning here: a memwrap model keeps its own "
        "MemoryState. Leave it out."
    )


def _behind(ids: Tensor | None, kwargs: dict) -> Tensor:
    """Count the tokens of each row up to the end of the prompt, `(B,)`: there the answer begins."""
    fed = ids if ids is not None else kwargs.get("inputs_embeds")
    if fed is None:  # transformers begins with the first token of all texts
        return torch.ones(1, dtype=torch.long)
    state, mask = kwargs.get(CACHE), kwargs.get("attention_mask")
    read = state.columns if state is not None and _holds(state, ids) else 0
    new = torch.full((len(fed),), fed.shape[1] - read)
    if mask is not None:
        new = mask[:, -int(new[0]) :].long().sum(1).cpu()
    return new if state is None else new + state.tokens_seen


def _holds(state: MemoryState, ids: Tensor | None) -> bool:
    """Tell whether `ids` begin with exactly what the state has read."""
    if ids is None or state.ids_hash is None or not 0 < state.columns < ids.shape[1]:
        return False
    repeat = state.batch_size // ids.shape[0]
    fresh = MemoryState({}, ids.shape[0])
    read = fresh.extend_hash(ids[:, : state.columns], state.columns)
    return torch.equal(state.ids_hash[::repeat].cpu(), read.cpu())  # type: ignore[union-attr]
