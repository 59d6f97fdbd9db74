"""An HTTP server with OpenAI's endpoints, and named states on top."""

from memwrap.serving.application import create_app
from memwrap.serving.engine import Engine, Limits
from memwrap.serving.named_states import NamedStates

__all__ = ["Engine", "Limits", "NamedStates", "create_app"]
