"""Streaming BPTT: peak memory of a training step on 8 and on 64 segments.

    python benchmarks/streaming.py

Each length runs in a process of its own (a peak cannot be reset); `bptt_segments` is 4. The
same step with the whole document in one graph stands beside it.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys

import torch
from common import save


def step(segments: int, streaming: bool) -> None:
    """One optimizer step; prints the process's peak resident memory in MB."""
    import tempfile

    from transformers import AutoModelForCausalLM

    import memwrap
    from memwrap.assets import asset
    from memwrap.training.arguments import MemoryTrainingArguments
    from memwrap.training.trainer import MemoryTrainer

    base = AutoModelForCausalLM.from_pretrained(asset("tiny-lm"), dtype=torch.float32)
    config = memwrap.ARMTConfig(
        segment_size=128, num_memory_tokens=8, d_mem=32, bptt_segments=4 if streaming else None
    )
    model = memwrap.wrap(base, config)
    ids = torch.randint(4, 4096, (segments * 128,))
    with tempfile.TemporaryDirectory() as folder:
        arguments = MemoryTrainingArguments(
            output_dir=folder, max_steps=1, per_device_train_batch_size=1, report_to="none",
            save_strategy="no", use_cpu=True, disable_tqdm=True, streaming=streaming,
        )  # fmt: skip
        data = [{"input_ids": ids, "labels": ids}]
        MemoryTrainer(model=model, args=arguments, train_dataset=data).train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(json.dumps({"peak": peak}))


def measure(segments: int, streaming: bool) -> float:
    command = [sys.executable, __file__, str(segments), str(int(streaming))]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(out.strip().splitlines()[-1])["peak"]


def main() -> None:
    peaks = {
        f"{'streaming' if streaming else 'one_graph'}_{segments}_segments_mb": measure(
            segments, streaming
        )
        for streaming in (True, False)
        for segments in (8, 64)
    }
    peaks["streaming_64_over_8"] = (
        peaks["streaming_64_segments_mb"] / peaks["streaming_8_segments_mb"]
    )
    peaks["one_graph_64_over_8"] = (
        peaks["one_graph_64_segments_mb"] / peaks["one_graph_8_segments_mb"]
    )
    save("streaming", {"goal": "streaming_64_over_8 <= 1.1", **peaks})


if __name__ == "__main__":
    if len(sys.argv) == 3:
        step(int(sys.argv[1]), bool(int(sys.argv[2])))
    else:
        main()
