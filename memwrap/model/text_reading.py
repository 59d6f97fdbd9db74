"""Text read into a state, once or several times, and the end of a document."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from memwrap.engine.answering import unmarked
from memwrap.engine.inputs import as_batch
from memwrap.memories.protocol import Memory
from memwrap.state.memory_state import MemoryState


class ReadingMixin:
    """The methods of a model that read without computing logits."""

    @torch.no_grad()
    def read(
        self,
        text: Tensor | str | list,
        attention_mask: Tensor | None = None,
        *,
        tokenizer: Any = None,
        state: MemoryState | None = None,
        passes: int = 1,
        progress: bool | str = False,
    ) -> MemoryState:
        """Read without computing logits, in space that does not grow with the text.

        Examples:
            >>> import memwrap
            >>> model = memwrap.load("armt-lm")
            >>> state = model.read([list(range(300))])
            >>> state.segments, state.fill  # two segments of 128 are written, 44 tokens wait
            (tensor([2]), tensor([44]))

        Args:
            text: `(B, T)` or `(T,)` ids, a list of id lists or tensors of any lengths, a string,
                or a list of strings.
            attention_mask: `(B, T)`, for padded tensors.
            tokenizer: turns strings into ids.
            state: continue this one; it stays as it is.
            passes: 2 reads the text twice, as if it stood there twice: what a memory of fixed size
                keeps, it then chooses knowing the whole. All counts are of both.
            progress: show a bar over segments; a text is its name.

        Returns:
            The state after the text.

        Raises:
            ValueError: for nothing to read, ids outside the vocabulary, strings without a
                tokenizer, or a second pass where a memory keeps entries of the text.
        """
        model: Any = self
        check_passes(model.memories, passes)
        ids, mask = as_batch(text, attention_mask, tokenizer)
        inputs = model._inputs(ids.to(model.device), None, mask)
        old = unmarked(model._state_of(state, inputs, mask, hold_open=False).clone())

        name = progress if isinstance(progress, str) else "reading"

        def bar(steps: Any) -> Any:
            return tqdm(steps, desc=name, unit="segment", disable=not progress)

        new = old
        for _ in range(passes):
            new = model.loop()(inputs, new, progress=bar).state
        return model._advanced(old, new)

    @torch.no_grad()
    def close_segment(self, state: MemoryState) -> MemoryState:
        """Close the open segments, as at the end of a document: runs the write.

        Examples:
            >>> import memwrap
            >>> model = memwrap.load("armt-lm")
            >>> state = model.close_segment(model.read([list(range(300))]))
            >>> state.segments, state.fill
            (tensor([3]), tensor([0]))

        Returns:
            The state with nothing open; the given one stays as it is.
        """
        model: Any = self
        model.check_state(state)
        new = model.loop().close(model._settled(state))
        return model._advanced(state.clone(), new)


def check_passes(memories: dict[str, Memory], passes: int) -> None:
    """Refuse a number of passes, or passes that would only fill a memory with copies.

    Raises:
        ValueError: says which memory, and what it would keep.
    """
    if not isinstance(passes, int) or isinstance(passes, bool) or passes < 1:
        raise ValueError(f"`passes` is {passes!r}; it must be an integer of at least 1.")
    kept = [name for name, memory in memories.items() if memory.claims.lengthens]
    if passes > 1 and kept:
        raise ValueError(
            f"`passes` is {passes}; {kept[0]!r} keeps entries of the text and would hold each "
            f"{passes} times. Read once; more passes are for memories that keep none."
        )
