"""A state made small: all that it holds as a few slots, and several states as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from memwrap.engine.inputs import as_batch, check_inputs
from memwrap.engine.loop import Loop
from memwrap.engine.step import SegmentReader
from memwrap.memories.parts.compacting import Compacts, Request
from memwrap.model.peft_prefix import load_prefix, save_prefix
from memwrap.state.memory_state import MemoryState

# What a text is asked for with before it is said once more.
REQUEST = "Repeat the text above word for word."


class CompactionMixin:
    """The methods of a model for whole states of a memory that `Compacts`."""

    @torch.no_grad()
    def compact(
        self,
        state: MemoryState,
        slots: int,
        queries: Literal["own", "repeat"] | Tensor | str | list = "own",
        *,
        text: Tensor | str | list | None = None,
        tokenizer: Any = None,
    ) -> MemoryState:
        """Make a small state of a large one: everything but the sinks becomes slots.

        Each layer is compacted before it attends to the queries, so that later layers' queries
        are those that will meet the slots. It may be repeated.

        Examples:
            >>> import memwrap
            >>> from memwrap.assets import asset
            >>> from transformers import AutoModelForCausalLM
            >>> base = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"))
            >>> model = memwrap.wrap(base, "compact", memory_size=None, slots=32)
            >>> state = model.read([list(range(300))])  # full attention
            >>> small = model.compact(state, slots=32)
            >>> small.nbytes < state.nbytes / 5
            True

        Args:
            state: is closed first; it stays as it is.
            slots: of a KV head (on average, where heads have budgets).
            queries: what slots are fitted to: the text's `"own"` queries, which a memory with
                `memory_size=None` keeps; those with which it is said once more (`"repeat"`, needs
                `text`); or a text that is run behind the state, as likely questions. One row, or
                one for each of the state.
            text: of `"repeat"`: what the state has read. It is run behind the state as the answer
                to a request for it, where the tokenizer has a chat template, and alone otherwise.
            tokenizer: turns strings into ids.

        Returns:
            The new state; what is read next stands where it would have stood.

        Raises:
            ValueError: for a model without such a memory, `"own"` where no queries are kept, or
                `"repeat"` without `text`.
        """
        queries = _repetition(queries, text, tokenizer)
        closed, request = self._compacted(state, slots, queries, tokenizer)
        name, _ = self._compacting_memory()
        new = closed.clone()
        layers = {**closed.memories[name]["layers"], **request.trees}
        new.memories = {**closed.memories, name: {**closed.memories[name], "layers": layers}}
        return new

    @torch.no_grad()
    def compaction_errors(
        self,
        state: MemoryState,
        slots: int,
        queries: Literal["own", "repeat"] | Tensor | str | list = "own",
        *,
        text: Tensor | str | list | None = None,
        tokenizer: Any = None,
    ) -> dict[int, Tensor]:
        """Measure what each KV head would lose by `compact`, which takes the same arguments.

        Returns:
            `(Hkv,)` by layer: the mean square error of the heads' output, in parts of what all
            heads of their layer give.
        """
        queries = _repetition(queries, text, tokenizer)
        return self._compacted(state, slots, queries, tokenizer, measures=True)[1].errors

    @torch.no_grad()
    def compose(self, states: Sequence[MemoryState]) -> MemoryState:
        """Join states of several documents: each row remembers what that row of all of them does.

        Every document stands where it stood, right before what is read next; the sinks are those
        of the first.

        Args:
            states: of this model, of as many rows each; open segments are closed.

        Raises:
            ValueError: for no states, other numbers of rows, or a memory that cannot.
        """
        model: Any = self
        name, memory = self._compacting_memory()
        if len(model.memories) > 1 or model.parts.recurrent:
            raise ValueError(
                f"States are joined where {name!r} is all that remembers; this model has more."
            )
        closed = [model.close_segment(state) for state in states]
        if not closed or len({state.batch_size for state in closed}) > 1:
            rows = [state.batch_size for state in closed]
            raise ValueError(f"`compose` got states of {rows} rows; it needs some of equally many.")
        new = closed[0].clone()
        new.memories = {name: memory.joined([state.memories[name] for state in closed])}
        for counter in ("segments", "tokens_seen"):
            setattr(new, counter, sum(getattr(state, counter) for state in closed))
        new.columns = sum(state.columns for state in closed)
        new.ids_hash = None
        return new

    def load_prefix(self, folder: str | Path) -> MemoryState:
        """Make a state of keys and values that PEFT trained: a folder of a `CARTRIDGE` or of prefix
        tuning. What is read next stands behind them, as PEFT has it; logits are the same.

        Args:
            folder: with `adapter_config.json` and `adapter_model.safetensors`.

        Returns:
            A state of one row (`state.repeat`); the first `num_sinks` are sinks, the others slots.

        Raises:
            ValueError: for another adapter, or one that does not fit this model.
        """
        return load_prefix(self, *self._compacting_memory(), Path(folder))

    def save_prefix(self, state: MemoryState, folder: str | Path, kind: str = "CARTRIDGE") -> None:
        """Write a state as a folder that PEFT loads (`PeftModel.from_pretrained`), with the same
        logits.

        Args:
            state: of one row, with slots or without.
            folder: files of an adapter in it are replaced.
            kind: `"CARTRIDGE"`, or `"PREFIX_TUNING"`, which older versions of PEFT know too.

        Raises:
            ValueError: where it cannot be done exactly: slots with biases (`bias_bound=0` fits
                without), heads of different numbers of rows, layers without slots.
        """
        name, memory = self._compacting_memory()
        self.check_state(state)  # type: ignore[attr-defined]
        save_prefix(self, name, memory, state, Path(folder), kind)

    def _compacted(
        self, state: MemoryState, slots: int, queries: Any, tokenizer: Any, measures: bool = False
    ) -> tuple[MemoryState, Request]:
        """Run the queries behind a state while its layers are compacted: the state that was
        closed for it, and what the layers gave."""
        model: Any = self
        name, memory = self._compacting_memory()
        own_queries = isinstance(queries, str) and queries == "own"
        if not isinstance(slots, int) or slots < 1:
            raise ValueError(f"`slots` is {slots!r}; it must be an integer of at least 1.")
        closed = model.close_segment(state)
        if own_queries and not memory.has_queries(closed.memories[name]):
            raise ValueError(
                "The state holds no queries of its text (memory_size=None keeps them until a state "
                "is compacted); give `queries` a text."
            )
        given = torch.zeros(1, 1, dtype=torch.long) if own_queries else queries
        ids, mask = as_batch(given, None, tokenizer)
        if len(ids) != closed.batch_size:
            if len(ids) != 1:
                raise ValueError(
                    f"`queries` has {len(ids)} rows, the state {closed.batch_size}; give one row "
                    "or as many."
                )
            ids = ids.expand(closed.batch_size, -1)
            mask = None if mask is None else mask.expand(closed.batch_size, -1)
        inputs = check_inputs(ids.to(model.device), None, mask)
        # All of the queries are one step: the first layer meets them before it is compacted.
        config = replace(model.memory_configs[0], segment_size=ids.shape[1] + 1)
        loop = Loop(SegmentReader(model.parts, model.memories), config, False, False)
        with memory.compacting(slots, own_queries, measures) as request:
            loop(inputs, closed.clone())
        return closed, request

    def _compacting_memory(self) -> tuple[str, Compacts]:
        model: Any = self
        for name, memory in model.memories.items():
            if isinstance(memory, Compacts):
                return name, memory
        raise ValueError(
            f"This model's memories are {list(model.memories)}; states are compacted and joined "
            "where one of them is 'compact' (memwrap.wrap(base, 'compact', memory_size=None))."
        )


def _repetition(queries: Any, text: Any, tokenizer: Any) -> Any:
    """Replace `"repeat"` by the ids with which a text is asked for and said again."""
    wanted = isinstance(queries, str) and queries == "repeat"
    if wanted != (text is not None):
        raise ValueError(
            'queries="repeat" runs a text behind its state and needs it as `text`; '
            + ("none was given." if wanted else f"`text` was given beside queries={queries!r:.40}.")
        )
    if not wanted:
        return queries
    ids, mask = as_batch(text, None, tokenizer)
    real = torch.ones_like(ids) if mask is None else mask
    rows = [row[kept.bool()] for row, kept in zip(ids, real, strict=True)]
    if getattr(tokenizer, "chat_template", None) is None:
        return rows
    turn = [{"role": "user", "content": REQUEST}]
    asked = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    head = torch.tensor(tokenizer(asked, add_special_tokens=False)["input_ids"])
    return [torch.cat([head, row.cpu()]) for row in rows]
