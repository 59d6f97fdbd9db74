"""EleutherAI's lm-evaluation-harness: its numbers are memwrap's own, its command knows the type."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from small import ROOT, word_tokenizer, wrapped
from torch import Tensor
from transformers import AutoModelForCausalLM

import memwrap
from memwrap import exporting
from memwrap.cli import lm_eval_model as harness
from memwrap.testing.helpers import randomise

TASKS = {
    "memory_choice": """
task: memory_choice
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
metric_list: [{metric: acc}]
""",
    "memory_text": """
task: memory_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}]
""",
    "memory_answer": """
task: memory_answer
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["w9"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


def words(count: int, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(f"w{i}" for i in torch.randint(0, 60, (count,), generator=generator))


ROWS = [
    {"text": words(17 + 7 * n, n), "choices": [words(1 + n % 3, 50 + n), words(2, 90 + n)],
     "answer": n % 2}
    for n in range(5)
]  # fmt: skip


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in TASKS.items():
        text += (
            f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}\n"
        )
        (folder / f"{name}.yaml").write_text(text + "test_split: test\n")
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with its base and its tokenizer."""
    folder = tmp_path_factory.mktemp("saved")
    randomise(wrapped("armt")).save_pretrained(folder, include_base=True)
    word_tokenizer().save_pretrained(folder)
    return folder


def own(model: Any, context: list[int], continuation: list[int]) -> float:
    """The log-likelihood of a continuation, from the loss of a memwrap model."""
    ids = torch.tensor([context + continuation])
    labels: Tensor = ids.clone()
    labels[:, : len(context)] = -100
    with torch.no_grad():
        return -float(model(ids, labels=labels, use_cache=False).loss) * len(continuation)


def check_likelihoods(lm: HFLM, model: Any) -> None:
    """Continuations of texts of several segments, texts as a whole, batches of unequal rows."""
    encode = lm.tokenizer.encode
    choices = [(row["text"], f" {choice}") for row in ROWS for choice in row["choices"]]
    got = lm.loglikelihood(
        [Instance("loglikelihood", {}, pair, n) for n, pair in enumerate(choices)]
    )
    want = [own(model, encode(a), encode(b)) for a, b in choices]
    assert [g[0] for g in got] == pytest.approx(want, rel=1e-4)
    texts = [row["text"] for row in ROWS]
    rolling = lm.loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), n) for n, text in enumerate(texts)]
    )
    start = [lm.tokenizer.bos_token_id]
    assert rolling == pytest.approx([own(model, start, encode(t)) for t in texts], rel=1e-4)
    # The memory takes part: the last words would be others without it.
    alone = own(model, encode(choices[-1][0])[-8:], encode(choices[-1][1]))
    assert abs(alone - want[-1]) > 1e-2


@pytest.mark.proof("lm-eval's `HFLM`: our log-likelihoods", "lm-eval")
@pytest.mark.parametrize("memory", ["armt", "infini", "window"])
def test_hflm_gives_our_log_likelihoods(memory: str) -> None:
    model = randomise(wrapped(memory)).eval()
    check_likelihoods(HFLM(pretrained=model, tokenizer=word_tokenizer(), batch_size=3), model)


@pytest.mark.proof("lm-eval with an exported checkpoint", "lm-eval")
def test_hflm_with_an_exported_checkpoint(saved: Path, tmp_path: Path) -> None:
    model = randomise(wrapped("armt")).eval()
    exporting.export(model, tmp_path / "out", tokenizer=word_tokenizer(), check=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    check_likelihoods(HFLM(pretrained=again, tokenizer=word_tokenizer(), batch_size=3), model)
    lm = HFLM(pretrained=str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    check_likelihoods(lm, model)


@pytest.mark.proof("lm-eval's `HFLM`: our log-likelihoods", "lm-eval")
def test_tasks_run_with_a_given_model(tasks: Path) -> None:
    model = randomise(wrapped("armt")).eval()
    lm = HFLM(pretrained=model, tokenizer=word_tokenizer(), batch_size=2)
    found = simple_evaluate(
        lm,
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    results = found["results"]
    check_results(results, model)
    assert 0 <= results["memory_answer"]["exact_match,none"] <= 1


def check_results(results: dict[str, Any], model: Any) -> None:
    """What the harness reports is what our own log-likelihoods give."""
    encode = word_tokenizer().encode
    right, nats, count = 0, 0.0, 0
    for row in ROWS:
        scores = [own(model, encode(row["text"]), encode(c)) for c in row["choices"]]
        right += int(scores[row["answer"]] > scores[1 - row["answer"]])
        nats -= own(model, [word_tokenizer().bos_token_id], encode(row["text"]))
        count += len(row["text"].split())
    assert results["memory_choice"]["acc,none"] == pytest.approx(right / len(ROWS))
    want = math.exp(nats / count)
    assert results["memory_text"]["word_perplexity,none"] == pytest.approx(want, rel=1e-3)


def run_harness(saved: Path, tasks: Path, out: Path, *command: str) -> None:
    """The harness's command in a process of its own; what it writes is what we compute."""
    done = subprocess.run(
        [
            sys.executable, *command, "--model", "memwrap", "--model_args",
            f"pretrained={saved},dtype=float32", "--tasks", "memory_choice,memory_text",
            "--include_path", str(tasks), "--device", "cpu", "--batch_size", "2",
            "--output_path", str(out),
        ],
        capture_output=True, text=True, cwd=ROOT, timeout=580, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|memory_choice|" in done.stdout and "|memory_text" in done.stdout
    written = json.loads(next(out.rglob("results_*.json")).read_text())
    check_results(written["results"], memwrap.load(saved))


@pytest.mark.proof("`memwrap lm_eval --model memwrap` on a saved folder", "lm-eval")
@pytest.mark.slow
def test_the_command_evaluates_a_saved_folder(saved: Path, tasks: Path, tmp_path: Path) -> None:
    run_harness(saved, tasks, tmp_path / "out", "-m", "memwrap", "lm_eval")


# What lm-eval does of itself after 0.4.13: entry points become placeholders before the command
# looks a name up. A release that has done so already keeps what it found.
DISCOVER = """
import importlib.metadata, sys
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import model_registry
import lm_eval.models
for point in importlib.metadata.entry_points(group="lm_eval.models"):
    if point.name not in model_registry:
        model_registry.register(point.name, target=point.value)
assert "memwrap.cli.lm_eval_model" not in sys.modules
cli_evaluate()
"""


@pytest.mark.proof("lm-eval's plugins: `--model memwrap` by the entry point", "lm-eval")
@pytest.mark.slow
def test_the_harness_finds_the_type_by_its_entry_point(
    saved: Path, tasks: Path, tmp_path: Path
) -> None:
    run_harness(saved, tasks, tmp_path / "out", "-c", DISCOVER)


def test_the_type_reads_whole_texts_and_says_what_it_does_not_take(saved: Path) -> None:
    lm = harness.MemwrapLM(str(saved), device="cpu")
    assert lm.max_length == 2**30 and lm.pretrained == str(saved)
    check_likelihoods(lm, lm.model)
    with pytest.raises(ValueError, match="'peft'"):
        harness.MemwrapLM(str(saved), peft="somewhere")
    with pytest.raises(ValueError, match="max_length"):
        harness.MemwrapLM(str(saved), batch_size="auto")
    for given, match in (
        ({"memory": "window", "segmentsize": 8}, "'segmentsize'.*window.*'segment_size'"),
        ({"segment_size": 8}, "'segment_size'.*a saved model"),
        ({"add_bos_tokens": True}, "did you mean 'add_bos_token'"),
    ):
        with pytest.raises(ValueError, match=match):
            harness.MemwrapLM(str(saved), **given)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        harness.MemwrapLM("./nowhere/at/all")
