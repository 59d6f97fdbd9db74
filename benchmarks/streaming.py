"""Streaming BPTT: peak memory of a training step on 8 and on 64 segments.

    python benchmarks/streaming.py

Each length runs in a process of its own (a peak cannot be reset); `bptt_segments` is 4. Beside
`MemoryTrainer`'s streaming stand one call as any loop makes it, and the document in one graph.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import torch
from common import save

KINDS = ("streaming", "one_call", "one_graph")


def step(segments: int, kind: str) -> None:
    """One optimizer step; prints the process's peak resident memory in MB."""
    import tempfile

    from transformers import AutoModelForCausalLM

    import memwrap
    from memwrap.assets import asset
    from memwrap.training.arguments import MemoryTrainingArguments
    from memwrap.training.trainer import MemoryTrainer

    base = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"), dtype=torch.float32)
    config = memwrap.ARMTConfig(
        segment_size=128,
        num_memory_tokens=8,
        d_mem=32,
        bptt_segments=None if kind == "one_graph" else 4,
    )
    model = memwrap.wrap(base, config)
    ids = torch.randint(4, 4096, (segments * 128,))
    with tempfile.TemporaryDirectory() as folder:
        arguments = MemoryTrainingArguments(
            output_dir=folder, max_steps=1, per_device_train_batch_size=1, report_to="none",
            save_strategy="no", use_cpu=True, disable_tqdm=True, streaming=kind == "streaming",
        )  # fmt: skip
        data = [{"input_ids": ids, "labels": ids}]
        MemoryTrainer(model=model, args=arguments, train_dataset=data).train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({"peak": peak}))


def measure(segments: int, kind: str) -> float:
    command = [sys.executable, __file__, str(segments), kind]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.strip().splitlines()[-1])["peak"]


def main() -> None:
    peaks = {f"{k}_{n}_segments_mb": measure(n, k) for k in KINDS for n in (8, 64)}
    for kind in KINDS:
        first, last = (peaks[f"{kind}_{n}_segments_mb"] for n in (8, 64))
        peaks[f"{kind}_64_over_8"] = last / first
    save("streaming", {"goal": "streaming and one_call, 64 over 8: <= 1.1", **peaks})


if __name__ == "__main__":
    if len(sys.argv) == 3:
        step(int(sys.argv[1]), sys.argv[2])
    else:
        main()
