"""Families whose decoder is reached otherwise than most: inside models that see, with ids that
matter, without keywords for their layers, with angles that depend on the length fed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import refused
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
)
