"""How a Hugging Face model's parts are found and met: one way for all families."""

from memwrap.backbones.attention import AttentionSizes, LayerAttention, Places, Rows
from memwrap.backbones.backbone import Backbone
from memwrap.backbones.layers import LayerReader

__all__ = ["AttentionSizes", "Backbone", "LayerAttention", "LayerReader", "Places", "Rows"]
