"""Run by a fresh Python on an exported checkpoint: does it load without memwrap, and agree?

    python check.py FOLDER EXPECTED.safetensors [PACKAGE...]

EXPECTED holds `ids`, `logits` and `generated`; PACKAGE is where a memory comes from, and as little
needed as memwrap. Prints the largest difference of the logits, and
whether the same ids were generated; exits with 1 if memwrap was needed.
"""

from __future__ import annotations

import importlib.abc
import json
import sys
from typing import Any


class Blocker(importlib.abc.MetaPathFinder):
    """An import hook that makes memwrap, its kernels and further packages impossible to import."""

    def __init__(self, *packages: str) -> None:
        self.blocked = {"memwrap", "memwrap_kernels", *packages}

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in self.blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(folder: str, expected: str, *packages: str) -> None:
    blocker = Blocker(*packages)
    sys.meta_path.insert(0, blocker)
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    wanted = load_file(expected)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        logits = model(input_ids=wanted["ids"]).logits.float()
        ids = wanted["ids"][:, :8]
        count = wanted["generated"].shape[1] - ids.shape[1]
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
    difference = float((logits - wanted["logits"]).abs().max())
    scale = float(wanted["logits"].abs().max())
    result = {
        "difference": difference,
        "scale": scale,
        "generates": bool(torch.equal(output, wanted["generated"])),
        "clean": blocker.blocked.isdisjoint(name.partition(".")[0] for name in sys.modules),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
