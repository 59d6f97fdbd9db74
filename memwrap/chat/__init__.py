"""Documents and questions as a chat model expects them: in the turns of its own template."""

from memwrap.chat.conversation import Conversation
from memwrap.chat.first_turn import read_document

__all__ = ["Conversation", "read_document"]
