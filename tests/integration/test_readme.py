"""README.md's example does what its comments say."""

from __future__ import annotations

import pytest
import readme_example
import torch
from transformers import LlamaForCausalLM


@pytest.mark.slow
def test_the_example_runs() -> None:
    found = readme_example.run()
    book, state = found["book"], found["state"]
    assert found["out"].logits.shape[:2] == book.shape and 0 < found["out"].loss < 20
    assert int(state.tokens_seen[0]) >= book.shape[1]
    assert "book.safetensors" in found["files"]
    assert {"armt-qwen3/config.json", "armt-qwen3/model.safetensors"} <= set(found["files"])
    assert type(found["base"]) is LlamaForCausalLM
    with torch.no_grad():
        assert found["base"](found["question"]).logits.isfinite().all()
