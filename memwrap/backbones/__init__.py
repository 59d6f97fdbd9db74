"""How a Hugging Face model's parts are found and met: one way for all families."""

from memwrap.backbones.attention_probe import AttentionSizes
from memwrap.backbones.backbone import Backbone
from memwrap.backbones.layer_attention import LayerAttention
from memwrap.backbones.layers import LayerReader
from memwrap.backbones.positions import MemoryKeyValues, Positions
from memwrap.backbones.vocabulary import add_token

__all__ = [
    "AttentionSizes",
    "Backbone",
    "LayerAttention",
    "LayerReader",
    "MemoryKeyValues",
    "Positions",
    "add_token",
]
