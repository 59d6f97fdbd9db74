"""Run README.md's example of use, as it is printed there but for the base: the shipped LM.

    python tests/integration/readme_example.py

Uses nothing of the checkout but the page, so that it tries an installed memwrap (`make fresh`).
"""

from __future__ import annotations

import re
import tempfile
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch

import memwrap
from memwrap.assets import asset

PAGE = Path(__file__).resolve().parents[2] / "README.md"
BASE = '"Qwen/Qwen3-0.6B"'


def example() -> str:
    """The page's Python block that loads a base, on the shipped LM."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    block = next((b for b in blocks if b.count(BASE) == 1), None)
    if block is None:
        raise ValueError(f"{PAGE} has no Python example that loads {BASE}.")
    return block.replace(BASE, repr(str(asset("tiny-lm"))))


def run() -> dict[str, Any]:
    """Run it in an empty folder.

    Returns:
        What it left: its variables, and `files` by their names.
    """
    torch.manual_seed(0)
    found: dict[str, Any] = {
        "book": torch.randint(4, 4096, (1, 2500)), "question": torch.randint(4, 4096, (1, 8)),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        exec(compile(example(), str(PAGE), "exec"), found)
        files = sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*.*"))
    return found | {"files": files}


def main() -> None:
    found = run()
    print(f"memwrap {memwrap.__version__} of {Path(memwrap.__file__).parent}")
    print(f"loss {found['out'].loss.item():.3f}, {found['state']}")
    print("files:", *found["files"])


if __name__ == "__main__":
    main()
