"""memwrap attaches memory to language models that already exist."""

from memwrap.memories.ahn import AHNConfig
from memwrap.memories.armt import ARMTConfig
from memwrap.memories.autocompressor import AutoCompressorConfig
from memwrap.memories.compact import CompactConfig
from memwrap.memories.compressive import CompressiveConfig
from memwrap.memories.config import MemoryConfig
from memwrap.memories.extended_mind import ExtendedMindConfig
from memwrap.memories.hmt import HMTConfig
from memwrap.memories.infini import InfiniConfig
from memwrap.memories.infllm import InfLLMConfig
from memwrap.memories.knnlm import KnnLMConfig
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
from memwrap.model.saving import VERSION as __version__
from memwrap.model.wrapping import linearize, load, unwrap, wrap
from memwrap.retrieval.library import Library
from memwrap.state.memory_state import MemoryState

__all__ = [
    "AHNConfig",
    "ARMTConfig",
    "AutoCompressorConfig",
    "CompactConfig",
    "CompressiveConfig",
    "ExtendedMindConfig",
    "HMTConfig",
    "InfLLMConfig",
    "InfiniConfig",
    "KnnLMConfig",
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
    "unwrap",
    "wrap",
]
