"""memwrap attaches memory to language models that already exist."""

from memwrap.configuration import MemoryModelConfig
from memwrap.memories.armt import ARMTConfig
from memwrap.memories.autocompressor import AutoCompressorConfig
from memwrap.memories.base import MemoryConfig
from memwrap.memories.compressive import CompressiveConfig
from memwrap.memories.hmt import HMTConfig
from memwrap.memories.infini import InfiniConfig
from memwrap.memories.knnlm import KnnLMConfig
from memwrap.memories.memoryprompt import MemoryPromptConfig
from memwrap.memories.rmt import RMTConfig
from memwrap.memories.window import WindowConfig
from memwrap.model import MemoryModelForCausalLM
from memwrap.registry import available, config_class
from memwrap.saving import VERSION as __version__
from memwrap.state import MemoryState
from memwrap.wrapping import load, unwrap, wrap

__all__ = [
    "ARMTConfig",
    "AutoCompressorConfig",
    "CompressiveConfig",
    "HMTConfig",
    "InfiniConfig",
    "KnnLMConfig",
    "MemoryConfig",
    "MemoryModelConfig",
    "MemoryModelForCausalLM",
    "MemoryPromptConfig",
    "MemoryState",
    "RMTConfig",
    "WindowConfig",
    "__version__",
    "available",
    "config_class",
    "load",
    "unwrap",
    "wrap",
]
