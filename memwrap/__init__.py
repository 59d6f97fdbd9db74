"""memwrap attaches memory to language models that already exist.

Public names are imported when they are first used, so that `import memwrap` and the command line
start at once.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from memwrap.io.version import VERSION as __version__
from memwrap.model.announcement import announce

if TYPE_CHECKING:
    from memwrap.chat.pipeline import pipeline
    from memwrap.memories.ahn import AHNConfig
    from memwrap.memories.armt import ARMTConfig
    from memwrap.memories.autocompressor import AutoCompressorConfig
    from memwrap.memories.compact import CompactConfig
    from memwrap.memories.compressive import CompressiveConfig
    from memwrap.memories.config import MemoryConfig
    from memwrap.memories.dms import DMSConfig
    from memwrap.memories.extended_mind import ExtendedMindConfig
    from memwrap.memories.hmt import HMTConfig
    from memwrap.memories.infini import InfiniConfig
    from memwrap.memories.infllm import InfLLMConfig
    from memwrap.memories.knnlm import KnnLMConfig
    from memwrap.memories.lact import LaCTConfig
    from memwrap.memories.landmark import LandmarkConfig
    from memwrap.memories.liger import LigerConfig
    from memwrap.memories.lolcats import LoLCATsConfig
    from memwrap.memories.memorizing import MemorizingConfig
    from memwrap.memories.memoryprompt import MemoryPromptConfig
    from memwrap.memories.neurocache import NeurocacheConfig
    from memwrap.memories.registry import available, config_class
    from memwrap.memories.rmt import RMTConfig
    from memwrap.memories.window import WindowConfig
    from memwrap.model.configuration import MemoryModelConfig
    from memwrap.model.memory_model import MemoryModelForCausalLM
    from memwrap.model.published_ahn import load_ahn
    from memwrap.model.wrapping import linearize, load, unwrap, wrap
    from memwrap.retrieval.library import Library
    from memwrap.state.memory_state import MemoryState

# Where each name comes from; `tests/test_structure.py` holds it against the imports above.
_PLACES = {
    "AHNConfig": "memwrap.memories.ahn",
    "ARMTConfig": "memwrap.memories.armt",
    "AutoCompressorConfig": "memwrap.memories.autocompressor",
    "CompactConfig": "memwrap.memories.compact",
    "CompressiveConfig": "memwrap.memories.compressive",
    "DMSConfig": "memwrap.memories.dms",
    "ExtendedMindConfig": "memwrap.memories.extended_mind",
    "HMTConfig": "memwrap.memories.hmt",
    "InfLLMConfig": "memwrap.memories.infllm",
    "InfiniConfig": "memwrap.memories.infini",
    "KnnLMConfig": "memwrap.memories.knnlm",
    "LaCTConfig": "memwrap.memories.lact",
    "LandmarkConfig": "memwrap.memories.landmark",
    "Library": "memwrap.retrieval.library",
    "LigerConfig": "memwrap.memories.liger",
    "LoLCATsConfig": "memwrap.memories.lolcats",
    "MemorizingConfig": "memwrap.memories.memorizing",
    "MemoryConfig": "memwrap.memories.config",
    "MemoryModelConfig": "memwrap.model.configuration",
    "MemoryModelForCausalLM": "memwrap.model.memory_model",
    "MemoryPromptConfig": "memwrap.memories.memoryprompt",
    "MemoryState": "memwrap.state.memory_state",
    "NeurocacheConfig": "memwrap.memories.neurocache",
    "RMTConfig": "memwrap.memories.rmt",
    "WindowConfig": "memwrap.memories.window",
    "available": "memwrap.memories.registry",
    "config_class": "memwrap.memories.registry",
    "linearize": "memwrap.model.wrapping",
    "load": "memwrap.model.wrapping",
    "load_ahn": "memwrap.model.published_ahn",
    "pipeline": "memwrap.chat.pipeline",
    "unwrap": "memwrap.model.wrapping",
    "wrap": "memwrap.model.wrapping",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        value = getattr(importlib.import_module(_PLACES[name]), name)
        globals()[name] = value
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"memwrap.{name}") is not None:
        return importlib.import_module(f"memwrap.{name}")
    raise AttributeError(f"module 'memwrap' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


announce()

__all__ = [
    "AHNConfig",
    "ARMTConfig",
    "AutoCompressorConfig",
    "CompactConfig",
    "CompressiveConfig",
    "DMSConfig",
    "ExtendedMindConfig",
    "HMTConfig",
    "InfLLMConfig",
    "InfiniConfig",
    "KnnLMConfig",
    "LaCTConfig",
    "LandmarkConfig",
    "Library",
    "LigerConfig",
    "LoLCATsConfig",
    "MemorizingConfig",
    "MemoryConfig",
    "MemoryModelConfig",
    "MemoryModelForCausalLM",
    "MemoryPromptConfig",
    "MemoryState",
    "NeurocacheConfig",
    "RMTConfig",
    "WindowConfig",
    "__version__",
    "available",
    "config_class",
    "linearize",
    "load",
    "load_ahn",
    "pipeline",
    "unwrap",
    "wrap",
]
