"""The keyword by which a model takes its cache: `cache` from transformers 5.24 on,
`past_key_values` before and in code of that time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import CausalLMOutputWithPast

NAMES = ("cache", "past_key_values", "cache_params")
# As outputs and `generate` of the installed transformers call it.
CACHE = next(f.name for f in fields(CausalLMOutputWithPast) if f.name in NAMES)


def find_cache_name(call: Callable[..., Any], config: PreTrainedConfig, model: str) -> str:
    """Find the keyword that a decoder takes its cache by: the one whose cache it fills.

    Args:
        call: runs the decoder on one token, with the keywords it is given.
        config: the decoder's config.
        model: its name, for errors.

    Raises:
        ValueError: if there is none, or the decoder takes no embeddings and positions.
    """
    refused: Exception | None = None
    for name in dict.fromkeys((CACHE, *NAMES)):
        cache = DynamicCache(config=config)
        try:
            call(**{name: cache, "use_cache": True})
        except TypeError as error:  # it takes no such keyword
            refused = refused or error
            continue
        except (AttributeError, NotImplementedError, ValueError) as error:
            refused = error  # it does, and not this cache
            break
        if _filled(cache):
            return name
    because = "" if refused is None else f" ({refused})"
    raise ValueError(
        f"memwrap cannot carry the cache of {model}: its decoder must read embeddings, with "
        f"positions of their own, onto a transformers Cache{because}."
    ) from refused


def _filled(cache: Cache) -> bool:
    return any(getattr(layer, "is_initialized", False) for layer in cache.layers)
