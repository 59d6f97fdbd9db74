"""What was saved is loaded in a fresh process and reads as before: every family of the tests, and a
base whose code lies beside its weights, which never runs unasked. One process loads them all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from remote_code import own_base
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    Gemma3Config,
)

import memwrap
from memwrap.backbones.recurrence import SUPPORTED
from memwrap.cli.small_models import small_model
from memwrap.testing.families import CONFIGS, build
from memwrap.testing.helpers import assert_close, tiny

AGAIN = """
import sys, torch, memwrap
from pathlib import Path
from transformers import AutoModelForCausalLM
place, bases = Path(sys.argv[1]), sys.argv[2:]
ids = torch.arange(3, 23)[None]
made = {}
for folder in sorted(place.glob("plain-*")):
    made[folder.name] = memwrap.load(folder)(ids).logits
for folder, base in zip(sorted(place.glob("own-*")), bases, strict=True):
    for given in ([], [base]):
        try:
            memwrap.load(folder, *given)
            raise SystemExit(f"{folder.name} was loaded unasked")
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
assert not any(name.startswith("transformers_modules") for name in sys.modules)
for folder, base in zip(sorted(place.glob("own-*")), bases, strict=True):
    made[folder.name] = memwrap.load(folder, trust_remote_code=True)(ids).logits
    model = AutoModelForCausalLM.from_pretrained(base, trust_remote_code=True)
    made[folder.name + "-given"] = memwrap.load(folder, model)(ids).logits
torch.save(made, place / "logits.pt")
"""


def infinite() -> torch.nn.Module:
    """A base whose config holds a float that JSON lacks."""
    return small_model(BambaConfig(attn_layer_indices=[1, 3]))


@pytest.mark.slow
@torch.no_grad()
def test_every_family_and_remote_code(tmp_path: Path) -> None:
    own = {"own-alone": own_base(tmp_path / "base")}
    own |= {f"own-{n}": own_base(tmp_path / n, "llama") for n in ("known", "whole")}
    ids = torch.arange(3, 23)[None]
    bases = {f"plain-{family}": build(family) for family in CONFIGS}
    bases["plain-seeing"] = small_model(Gemma3Config())
    if SUPPORTED:
        bases["plain-infinite"] = infinite()
    for name, place in own.items():
        bases[name] = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=True)
    wanted = {}
    for name, base in bases.items():
        model = memwrap.wrap(base, tiny("armt")).eval()
        model.save_pretrained(tmp_path / name, include_base=name not in ("own-alone", "own-known"))
        wanted[name] = model(ids).logits
    script = tmp_path / "again.py"
    script.write_text(AGAIN)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path), *map(str, own.values())],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = torch.load(tmp_path / "logits.pt")
    assert made.keys() == wanted.keys() | {f"{n}-given" for n in wanted if n.startswith("own")}
    for name, logits in made.items():
        assert_close(logits, wanted[name.removesuffix("-given")], 1e-5, name)
