"""How a Hugging Face model's parts are found and met: one way for all families."""

from memwrap.backbones.backbone import Backbone
from memwrap.backbones.layers import LayerReader

__all__ = ["Backbone", "LayerReader"]
