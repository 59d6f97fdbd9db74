"""The tiny models that the invariants run on."""

from __future__ import annotations

from memwrap.testing.families import FAMILIES


def test_every_family_is_here() -> None:
    assert {"llama", "mistral", "qwen3", "gemma3", "phi3", "olmo2", "gpt2", "opt"} <= set(FAMILIES)
