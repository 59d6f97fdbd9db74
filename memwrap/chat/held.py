"""What a state remembers of the chat it stands in: the text around what was read."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from memwrap.chat.turns import Message, Turns, under
from memwrap.state.memory_state import MemoryState


@dataclass
class Held:
    """The open turn that a state stands in.

    A document may be long, so its text is not kept: the last of what was read (`context`), which
    shows the tokenizer where the rest goes on, and the last words, which wait (`tail`): how they
    are cut into tokens depends on what follows them.

    Attributes:
        context, tail: of the document; empty if none was read.
        turns: said since then.
        read: ids of the rendered chat, with `context + tail` for the document, that were read.
        lead: ids of it that stand in front of what the user says.
        behind: other text was read first, so that the chat has no beginning of its own.
    """

    context: str = ""
    tail: str = ""
    turns: list[Message] = field(default_factory=list)
    read: int = 0
    lead: int = 0
    behind: bool = False

    @property
    def document(self) -> str:
        return self.context + self.tail

    def messages(self, turns: list[Message]) -> list[Message]:
        """Return turns with the document in the first of them."""
        first, *rest = turns
        return [{**first, "content": under(self.document, first["content"])}, *rest]

    def put(self, state: MemoryState) -> None:
        """Note all this in a state."""
        state.chat = {"columns": state.columns, **asdict(self)}

    @classmethod
    def of(cls, state: MemoryState | None, turns: Turns) -> Held | None:
        """Find what is noted in a state, or None if something else was read since.

        A template may name the day, so that it opens with other ids than when the text was read;
        what comes behind counts.

        Raises:
            ValueError: for a note that cannot be read.
        """
        note = dict(state.chat or {}) if state is not None else {}
        if state is None or note.pop("columns", None) != state.columns or not turns.present:
            return None
        try:
            held = cls(**note)
            held.read += turns.lead_length() - held.lead
            held.messages([*held.turns, {"role": "user", "content": ""}])
            said = [part for turn in held.turns for part in (turn["role"], turn["content"])]
            if not all(isinstance(text, str) for text in (held.context, held.tail, *said)):
                raise TypeError
            if not 0 <= note["lead"] <= note["read"] <= state.columns:
                raise TypeError
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError("The state's chat is damaged; read the document again.") from error
        return held


__all__ = ["Held"]
