"""How a Hugging Face model's parts are found and met: one way for all families."""

from memwrap.backbones.attention import LayerAttention
from memwrap.backbones.backbone import Backbone
from memwrap.backbones.layers import LayerReader
from memwrap.backbones.places import Places, Rows
from memwrap.backbones.probing import AttentionSizes
from memwrap.backbones.vocabulary import add_token
from memwrap.backbones.windows import SlidingWindow

__all__ = [
    "AttentionSizes",
    "Backbone",
    "LayerAttention",
    "LayerReader",
    "Places",
    "Rows",
    "SlidingWindow",
    "add_token",
]
