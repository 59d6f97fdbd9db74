"""`memwrap train decoder`, end to end on a small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from commands import run

import memwrap
from memwrap.data.stdlib_corpus import split_of


def test_a_decoder_learns_a_store(base: Path, tmp_path: Path) -> None:
    texts, store, output = (tmp_path / name for name in ("texts", "store", "run"))
    texts.mkdir()
    for index in range(30):
        text = " ".join(f"Line {n} of text {index} says {n * index}.\n" for n in range(9))
        (texts / f"text{index}.md").write_text(text)
    assert {split_of(path.name) for path in texts.iterdir()} == {"train", "validation", "test"}
    run("store", "build", texts, "-o", store, "--model", base)
    small = ["num_layers=1", "hidden_size=16", "num_heads=2", "num_kv_heads=1", "inner_size=16",
             "window_size=16", "tokens=16", "batch_size=2", "steps=2"]  # fmt: skip
    words = ["train", "decoder", "--model", base, "--data", texts, "-o", output, *small]
    assert "store=FOLDER" in run(*words, expect=2).output
    text = run(*words, f"store={store}").output
    assert f"saved {output}: 2 steps" in text
    report = json.loads((output / "decoder.json").read_text())
    loaded: Any = memwrap.load(output)
    memory = loaded.memories["memory_decoder"]
    assert report["steps"] == 2
    assert report["parameters"] == sum(p.numel() for p in memory.parameters())
    shares = {float(share): nats for share, nats in report["nats"].items()}
    assert memory.config.interpolation == min(shares, key=lambda share: shares[share])
