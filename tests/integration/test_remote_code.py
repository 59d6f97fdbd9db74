"""A base whose code lies beside its weights: it is wrapped, trained, saved, and loaded in a fresh
process, and its code never runs unasked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import memwrap
from memwrap.testing.helpers import assert_close, ids, tiny

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(__file__).with_name("ran").touch()
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
AGAIN = """
import sys, torch, memwrap
folder, base, out = sys.argv[1:]
try:
    memwrap.load(folder)
    raise SystemExit("it was loaded unasked")
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
ids = torch.arange(3, 23)[None]
asked = memwrap.load(folder, trust_remote_code=True)
given = memwrap.load(folder, base, trust_remote_code=True)
torch.save([asked(ids).logits, given(ids).logits, memwrap.load(folder, given.backbone
    if memwrap.unwrap(given) is not None else None)(ids).logits], out)
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "own.py").write_text(CODE)
    text = (folder / "config.json").read_text()
    own = (
        '"auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},'
    )
    text = text.replace('"model_type": "llama"', f'{own}\n"model_type": "own_llama"')
    (folder / "config.json").write_text(text)
    return folder


@pytest.mark.parametrize("include_base", [False, True])
def test_remote_code_is_saved_and_loaded_where_it_is_asked_for(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, include_base: bool
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    backbone = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
    model = memwrap.wrap(backbone, tiny("armt"))
    model.backbone.requires_grad_(False)
    model(input_ids=ids(1, 20), labels=ids(1, 20)).loss.backward()
    torch.optim.SGD(model.memory_parameters(), lr=0.1).step()
    model.save_pretrained(tmp_path / "model", include_base=include_base)
    script, out = tmp_path / "again.py", tmp_path / "logits.pt"
    script.write_text(AGAIN)
    command = [sys.executable, str(script), str(tmp_path / "model"), str(base), str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    want = model.eval()(torch.arange(3, 23)[None]).logits
    for logits in torch.load(out):
        assert_close(logits, want, 1e-6)
