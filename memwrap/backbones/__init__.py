"""How a Hugging Face model's parts are found and met: one way for all families."""

from memwrap.backbones.attention_probe import AttentionSizes
from memwrap.backbones.backbone import Backbone
from memwrap.backbones.layer_attention import LayerAttention
from memwrap.backbones.layers import LayerReader
from memwrap.backbones.positions import Places, Rows
from memwrap.backbones.vocabulary import add_token

__all__ = [
    "AttentionSizes",
    "Backbone",
    "LayerAttention",
    "LayerReader",
    "Places",
    "Rows",
    "add_token",
]
