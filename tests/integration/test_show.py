"""What people do with the models they have: wrap, train a step, generate, save, and load in a fresh
process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from remote_code import own_base
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    Cohere2Config,
    CohereConfig,
    DeepseekV3Config,
    FalconH1Config,
    Gemma3Config,
    Gemma4Config,
    Glm4Config,
    GptOssConfig,
    GraniteMoeHybridConfig,
    NemotronHConfig,
    Qwen3_5Config,
    Qwen3NextConfig,
)

import memwrap
from memwrap.cli.small_models import small_model
from memwrap.testing.helpers import ids, tiny

MIXED = ["linear_attention", "full_attention"] * 2
MODELS: dict[str, Callable[[], Any]] = {
    "gemma3": lambda: Gemma3Config(),
    "gpt_oss": GptOssConfig,
    "deepseek_v3": DeepseekV3Config,
    "glm4": Glm4Config,
    "cohere": CohereConfig,
    "cohere2": Cohere2Config,
    "gemma4": Gemma4Config,
}
# Those with recurrent layers of their own are tried with a memory that sums, too.
RECURRENT: dict[str, Callable[[], Any]] = {
    "granite4h": lambda: GraniteMoeHybridConfig(layer_types=MIXED, num_hidden_layers=4),
    "bamba": lambda: BambaConfig(attn_layer_indices=[1, 3]),
    "falcon_h1": FalconH1Config,
    "nemotron_h": NemotronHConfig,
    "qwen3_next": Qwen3NextConfig,
    "qwen3_5": Qwen3_5Config,
}
AGAIN = """
import sys, torch, memwrap
from pathlib import Path
place = Path(sys.argv[1])
for folder in sorted(place.glob("*-*")):
    model = memwrap.load(folder, trust_remote_code=folder.name.startswith("remote"))
    asked = torch.load(folder / "ids.pt")
    made = model.generate(asked, max_new_tokens=5, do_sample=False)
    torch.save((model(asked).logits.detach(), made), folder / "made.pt")
"""


def trained(base: Any, memory: str) -> Any:
    """Wrap a base and train all of it for a step."""
    model = memwrap.wrap(base, tiny(memory)).train()
    text = ids(2, 20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loss = model(text, labels=text).loss
    loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.memory_parameters())
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert model(text, labels=text).loss < loss
    return model.eval()


@pytest.mark.full
def test_models_all_the_way(tmp_path: Path) -> None:
    configs = MODELS | RECURRENT
    bases: dict[str, Any] = {n: lambda c=c: small_model(c()) for n, c in configs.items()}
    own = own_base(tmp_path / "own")
    bases["remote"] = lambda: AutoModelForCausalLM.from_pretrained(own, trust_remote_code=True)
    wanted = {}
    for name, build in bases.items():
        for memory in ("armt", "landmark", "infini")[: 3 if name in RECURRENT else 2]:
            model = trained(build(), memory)
            folder = tmp_path / "saved" / f"{name}-{memory}"
            model.save_pretrained(folder)
            asked = ids(2, 13, seed=3)
            torch.save(asked, folder / "ids.pt")
            with torch.no_grad():
                made = model.generate(asked, max_new_tokens=5, do_sample=False)
                wanted[folder] = model(asked).logits, made
    script = tmp_path / "again.py"
    script.write_text(AGAIN)
    command = [sys.executable, str(script), str(tmp_path / "saved")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for folder, (logits, made) in wanted.items():
        again, generated = torch.load(folder / "made.pt")
        assert torch.equal(again, logits), folder.name
        assert torch.equal(generated, made), folder.name
