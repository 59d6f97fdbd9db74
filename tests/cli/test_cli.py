"""The command line, from a recipe to an answer, with a tiny random model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from commands import run
from transformers import AutoTokenizer

import memwrap
from memwrap.chat import Conversation
from memwrap.cli import doctor
from memwrap.cli.catalogue import own_memories
from memwrap.memories.protocol import places_of
from memwrap.memories.registry import memory_class
from memwrap.model.configuration import MemoryModelConfig

ROOT = Path(__file__).resolve().parents[2]
OTHERS = {"memwrap", "python", "bitsandbytes"}  # constraints.txt has none of them
TEXT = "".join(f"Line {n}: the number of this line is {n}.\n" for n in range(40))


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "document.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def trained(
    base: Path, document: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """What `memwrap train` makes of a real model's recipe in two steps, and what it prints."""
    output = tmp_path_factory.mktemp("runs") / "first"
    result = run(
        "train", "armt_lora_qwen3_0.6b", f"model.name={base}", f"data.source={document}",
        f"output={output}", "trainer.steps=2", "trainer.accumulation=1", "trainer.device=cpu",
        "trainer.save_every=null", "memory.segment_size=16", "memory.num_memory_tokens=2",
        "data.max_tokens=64", "data.min_tokens=8", "data.split=null",
    )  # fmt: skip
    return output, result.output


@pytest.fixture(scope="module")
def state(trained: tuple[Path, str], document: Path) -> Path:
    path = trained[0].parent / "document.safetensors"
    result = run("read", trained[0], document, "-o", path)
    assert f"wrote {path}" in result.output
    return path


def test_list() -> None:
    output = run("list").output
    for name in memwrap.available():
        assert any(line.startswith(name) and len(line) > 60 for line in output.splitlines())


def test_train_says_what_it_saved(trained: tuple[Path, str]) -> None:
    folder, output = trained
    assert f"saved {folder}: 2 of 2 steps (until trainer.steps)" in output
    command = json.loads((folder / "run.json").read_text())["command"]
    assert command.startswith("memwrap train armt_lora_qwen3_0.6b model.name=")


def test_a_dry_run_prints_the_recipe_and_writes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "run"
    result = run("train", "rmt_lora_tiny", "--dry-run", f"output={output}", "trainer.steps=7")
    assert "steps: 7" in result.stdout and "name: rmt" in result.stdout
    assert not output.exists()
    result = run("train", "armt_lora_llama3.2_1b", "data.source=/not/there", "--dry-run")
    assert "would stop" in result.stderr and "/not/there" in result.stderr
    named = ("--model", "armt-lm", "--data", "stdlib", "-o", output)
    result = run("train", "rmt_lora_tiny", *named, "--dry-run")
    assert all(f": {word}\n" in result.stdout for word in ("armt-lm", "stdlib", output))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("train", "armt_lora_tinny"), "Did you mean 'armt_lora_tiny'"),
        (("train", "armt_lora_tiny", "trainer.stepps=1"), "`trainer.steps`"),
        (("train", "armt_lora_tiny", "memory.num_memory_token=1"), "`memory.num_memory_tokens`"),
        (("train", "armt_lora_tiny", "data.source=/not/there"), "no such file or folder"),
        (("train", "armt_lora_tiny", "model.name=/not/there"), "no such folder"),
        (("train", "armt_lora_tiny", "trainer.report_to=elsewhere"), "`trainer.report_to`"),
        (("train", "armt_lora_tiny", "trainer.report_to=swanlab"), "not installed"),
        (("train",), "Give the name of a recipe"),
        (("train", "rmt_lora_tiny", "--memory", "armt"), "A recipe names its memory"),
        (("train", "--model", "tiny-lm", "--memory", "armt"), "--data FOLDER"),
        (("train", "--model", "tiny-lm", "--data", "stdlib"), "give --memory"),
        (("train", "--model", "armt-lm", "--data", "stdlib", "--memory", "armt"), "of its own"),
        (("train", "--model", "tiny-lm", "--data", "/no", "--memory", "rmt"), "such file or"),
        (("read", "tiny-lm", "/not/there.txt", "-o", "x"), "no file or folder"),
        (("read", "tiny-lm", ROOT / "mkdocs.png", "-o", "x"), "no file or folder"),
        (("read", "tiny-lm", ROOT / "docs/figures/comparison.png", "-o", "x"), "of a kind"),
        (("read", "tiny-lm", __file__, "-o", "x"), "model without memory"),
        (("read", "tiny-lm", __file__, "-o", "x", "--memory", "infllm", "top_kk=1"), "`top_k`"),
        (("read", "armt-lm", __file__, "-o", "x", "--memory", "infllm"), "a memory of its own"),
        (("eval", "armt-lm", "--passes", "2"), "perplexity reads its texts once"),
        (("chat", "/not/there", "--ask", "a"), "no folder /not/there"),
        (("chat", "tiny-lm", "--ask", "a"), "--memory NAME"),
        (("chat", "tiny-lm", "--max-new-tokens", "0"), "at least 1"),
        (("eval", "tiny-lm"), "--memory NAME"),
        (("export", "tiny-lm", "x"), "--memory NAME"),
        (("fetch", "tiny-lm"), "known: smollm2"),
        (("doctor", "--model", "/not/there"), "There is no folder /not/there"),
        (("demo", "--minutes", "0"), "must be positive"),
    ],
)  # fmt: skip
def test_mistakes_take_two_lines_and_code_2(words: tuple, message: str) -> None:
    result = run(*words, expect=2)
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) <= 2


def test_reading_remembers_all_of_it(trained: tuple[Path, str], state: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    loaded = memwrap.MemoryState.load(state, memwrap.load(trained[0]))
    assert int(loaded.tokens_seen[0]) == len(tokenizer(TEXT).input_ids)
    assert int(loaded.segments[0]) == len(tokenizer(TEXT).input_ids) // 16


def test_reading_continues_a_state(
    trained: tuple[Path, str], state: Path, document: Path, tmp_path: Path
) -> None:
    more = tmp_path / "twice.safetensors"
    run("read", trained[0], document, "-o", more, "--state", state)
    once, twice = (memwrap.MemoryState.load(p) for p in (state, more))
    assert int(twice.tokens_seen[0]) == 2 * int(once.tokens_seen[0]) - 1  # one beginning of text
    again = tmp_path / "again.safetensors"
    run("read", trained[0], document, "-o", again, "--passes", "2")
    both = memwrap.MemoryState.load(again)
    assert both.ids_hash == twice.ids_hash and torch.equal(both.tokens_seen, twice.tokens_seen)


def test_asking(trained: tuple[Path, str], state: Path) -> None:
    words = ("chat", trained[0], "--state", state, "--max-new-tokens", "5", "--ask")
    first = run(*words, "Line 3:").stdout
    assert first == run(*words, "Line 3:").stdout
    result = run(*words, " ", expect=2)
    assert "empty" in result.stderr


def test_talking(trained: tuple[Path, str], state: Path, tmp_path: Path) -> None:
    saved = tmp_path / "talk.safetensors"
    lines = f"Line 3:\n/save {saved}\n/reset\nLine 3:\n/save\n/quit\nnever"
    result = run("chat", trained[0], "--state", state, "--max-new-tokens", "4", stdin=lines)
    assert "tokens read" in result.output and "give a file" in result.output
    before, after = (memwrap.MemoryState.load(p) for p in (state, saved))
    assert int(after.tokens_seen[0]) > int(before.tokens_seen[0])


def test_a_conversation_is_one_text(trained: tuple[Path, str]) -> None:
    """Every token of the talk is read once: the answers equal those to the whole text."""
    model = memwrap.load(trained[0])
    tokenizer = AutoTokenizer.from_pretrained(trained[0])
    model.generation_config.eos_token_id = None
    talk = Conversation(model, tokenizer, max_new_tokens=12, do_sample=False)
    talk.ask("Line 1: the number")
    # Hold the second question's tokens against one generate over everything before it.
    state, pending = talk.state, torch.tensor([talk._ids[talk._read :]])
    assert pending.shape == (1, 1)
    question = "\nLine 2: the number"
    ids = tokenizer(question, add_special_tokens=False, return_tensors="pt").input_ids
    want = model.generate(
        torch.cat([pending, ids], 1), cache=state, max_new_tokens=12, do_sample=False,
        pad_token_id=3,
    )  # fmt: skip
    assert talk.ask(question) == tokenizer.decode(want[0, ids.shape[1] + 1 :], True)
    total = len(tokenizer("Line 1: the number").input_ids) + ids.shape[1] + 24
    assert talk.state is not None and int(talk.state.tokens_seen[0]) == total - 1
    talk.reset()
    assert talk.state is None


def test_any_model_takes_a_memory(base: Path, document: Path, tmp_path: Path) -> None:
    """Files and settings stand in any order; a bad file does not stop the others."""
    (tmp_path / "page.html").write_text("<head><title>no</title></head><p>Line 41 <b>is</b> last.")
    (tmp_path / "bad.pdf").write_bytes(b"no pdf")
    words = ("--memory", "infllm", "segment_size=16", "window_size=32", "block_size=8", "top_k=2")
    state = tmp_path / "state"
    result = run("read", base, document, tmp_path, "-o", state, *words)
    assert "left out:" in result.stderr and "bad.pdf" in result.stderr
    assert "2 files, 1 left out" in result.stderr
    assert "page.html: 100%" in result.stderr, "the bar has the name of the file that is read"
    ask = ("--max-new-tokens", "4", "--ask", "Line 3:")
    first = run("chat", base, *words, "--state", state, *ask).stdout
    again = run("chat", base, "--read", document, tmp_path / "page.html", *words, *ask).stdout
    assert first == again
    result = run("read", base, document, "-o", tmp_path / "x", *words, "--passes=2", expect=2)
    assert "'infllm' keeps entries of the text" in result.stderr
    result = run("read", base, tmp_path / "bad.pdf", "-o", tmp_path / "x", *words, expect=2)
    assert "Nothing can be read" in result.stderr and not (tmp_path / "x").exists()


@pytest.mark.slow
def test_any_model_is_exported_with_a_memory(base: Path, tmp_path: Path) -> None:
    run("export", base, tmp_path / "out", "--memory", "rmt", "segment_size=16")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_missing_reader_is_said_before_anything_is_read(
    base: Path, document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "page.html").write_text("<p>Text.")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda n, *a: None if n == "bs4" else find(n, *a)
    )
    monkeypatch.setattr("memwrap.model.opening.open_model", None)
    result = run("read", base, document, tmp_path / "page.html", "-o", tmp_path / "x", expect=2)
    assert "pip install beautifulsoup4" in result.stderr


def test_training_without_a_recipe(base: Path, document: Path, tmp_path: Path) -> None:
    """And then going on with what came out."""
    first, second = tmp_path / "first", tmp_path / "second"
    few = ("trainer.steps=1", "trainer.accumulation=1", "trainer.device=cpu")
    words = ("--model", base, "--data", document, "--memory", "rmt", "segment_size=16")
    run("train", *words, *few, "num_memory_tokens=2", "-o", first)
    about = json.loads((first / "run.json").read_text())["command"]
    assert about.startswith(f"memwrap train --model {base} --data {document} --memory rmt -o")
    values = yaml.safe_load((first / "recipe.yaml").read_text())
    assert values["memory"]["num_memory_tokens"] == 2 and values["data"]["max_tokens"] == 128
    run("train", "--model", first, "--data", document, *few, "learning_rate=0", "-o", second,
        expect=2)  # fmt: skip
    run("train", "--model", first, "--data", document, *few, "trainer.learning_rate=0",
        "trainer.memory_learning_rate=0", "-o", second)  # fmt: skip
    one, two = (memwrap.load(folder) for folder in (first, second))
    assert one.fingerprint() == two.fingerprint()


def test_the_light_commands_import_no_torch() -> None:
    """Names, help and version come at once; `list` says what the registry says."""
    code = (
        "import sys, memwrap; from memwrap.cli.app import app\n"
        "from typer.testing import CliRunner\n"
        "for words in (['--version'], ['--help'], ['list'], ['chat', '--help']):\n"
        "    done = CliRunner().invoke(app, words); assert done.exit_code == 0, done.output\n"
        "    print(done.output)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'peft', 'huggingface_hub'} & {*sys.modules}\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"memwrap {memwrap.__version__}" in done.stdout
    for entry in own_memories():
        kind = memory_class(entry.name)
        assert entry.places == ", ".join(places_of(kind))
        assert entry.summary == " ".join(
            (memwrap.config_class(entry.name).__doc__ or "").split("\n\n")[0].split()
        )
    assert {e.name for e in own_memories()} <= {*memwrap.available()}
    assert len(own_memories()) >= 17


@pytest.mark.parametrize(
    "first",
    [
        pytest.param("", marks=pytest.mark.slow),
        pytest.param("from memwrap.training.trainer import MemoryTrainer", marks=pytest.mark.slow),
        pytest.param("from memwrap import ARMTConfig", marks=pytest.mark.slow),
    ],
)
def test_auto_classes_know_saved_models_after_a_plain_import(first: str) -> None:
    code = (
        f"import memwrap; {first}\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "place = memwrap.assets.asset('armt-lm')\n"
        "assert AutoConfig.from_pretrained(place).model_type == 'memwrap'\n"
        "model = AutoModelForCausalLM.from_pretrained(place)\n"
        "assert type(model) is memwrap.MemoryModelForCausalLM, type(model)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_eval_perplexity(trained: tuple[Path, str], tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name + TEXT)
    words = ("eval", trained[0], "--documents", tmp_path, "--split", "all", "--tokens", "80")
    output = run(*words, "--count", "2").output
    for curve in ("memory", "memory off", "memory shuffled", "base, truncated"):
        assert f"| {curve} |" in output
    values = json.loads((trained[0] / "eval" / "perplexity.json").read_text())
    assert values["documents"] == 2 and values["segment_size"] == 16
    for curve in values["curves"].values():
        assert curve["seconds"] > 0 and curve["peak_bytes"] > 1e6
    assert (trained[0] / "eval" / "perplexity.png").stat().st_size > 1000
    page = (trained[0] / "eval" / "perplexity.html").read_text()
    assert page.count("data:image/png;base64,") == 1 and "http" not in page
    assert page.count("base, window + sinks") == 2  # its curve's row, and what it took
    # One document has no other to be shuffled with.
    output = run(*words, "--count", "1", "-o", tmp_path / "one").output
    assert "shuffled" not in output and (tmp_path / "one" / "perplexity.json").is_file()
    result = run("eval", trained[0], "--documents", tmp_path, "--split", "all", expect=2)
    assert "fewer than 8192 tokens" in result.stderr
    result = run("eval", trained[0], "--task", "perplexty", expect=2)
    assert "Did you mean 'perplexity'?" in result.stderr
    result = run("eval", trained[0], "--task", "recall", expect=2)
    assert "recall recipe" in result.stderr


def test_eval_tasks_and_compare(trained: tuple[Path, str], tmp_path: Path) -> None:
    words = ("--task", "updates", "--lengths", "30,60", "--samples", "2", "-o", tmp_path)
    printed = run("eval", trained[0], *words).output
    assert "| updates | memory shuffled |" in printed
    found = tmp_path / "tasks.json"
    printed = run("compare", found, found, "-o", tmp_path / "both.html").output
    assert printed.count("| updates, 60 tokens |") == 6
    assert (tmp_path / "both.html").stat().st_size > 500
    assert "perplexity.png" in run("compare", tmp_path / "perplexity.png", expect=2).stderr


def test_eval_recall(tmp_path: Path) -> None:
    output = tmp_path / "recall"
    run("train", "armt_recall_tiny", f"output={output}", "trainer.steps=1", "trainer.batch_size=4",
        "recall.num_pairs=3", "recall.tasks=[remember]", "trainer.device=cpu")  # fmt: skip
    printed = run("eval", output, "--task", "recall", "--samples", "4").output
    assert "remember" in printed and "rewrite" not in printed and "| chance |" in printed
    values = json.loads((output / "eval" / "recall.json").read_text())
    # There are 16 keys of one symbol: no more distinct ones can be stored.
    assert all(result["distances"] == [1, 2, 4, 8, 16] for result in values.values())
    for result in values.values():
        assert result["seconds"].keys() == result["peak_bytes"].keys() == result["accuracy"].keys()
        assert min(result["seconds"].values()) > 0
    assert (output / "eval" / "recall.png").stat().st_size > 1000
    assert "data:image/png;base64," in (output / "eval" / "recall.html").read_text()


@pytest.mark.slow  # `make smoke-newest` asks it too
def test_doctor(base: Path) -> None:
    output = run("doctor", "--model", base).output
    assert torch.__version__ in output and "ops" in output
    for name in memwrap.available():
        assert any(line.split() == [name, "works"] for line in output.splitlines())


@pytest.mark.parametrize("settings", [{}, {"state_decay": 0.8}, {"read_cap": 1.0}])
def test_doctor_tells_of_sums_without_a_bound(settings: dict) -> None:
    memories = [memwrap.ARMTConfig(**settings).to_dict(), memwrap.RMTConfig().to_dict()]
    config = MemoryModelConfig(memories=memories)
    assert doctor.growth_note(config) == ""  # nothing is known of a training
    config.trained_norms = {"armt": {"0": 2.0, "3": 31.25}}
    words = "nothing bounds what 'armt' sums (at most 31.25, in layer 3, in training)"
    told = doctor.growth_note(config)
    assert (words in told) is (told != "") is not bool(settings)


def test_doctor_compares_with_the_tested_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of constraints.txt, a file that the wheel brings along."""
    text = (ROOT / "constraints.txt").read_text()
    pins = doctor.tested()
    assert pins["torch"] in text and len(pins) == text.count("==") - 1  # one in a comment
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    shipped = wheel["targets"]["wheel"]["force-include"]["constraints.txt"]
    assert ROOT / shipped == doctor._PINS[0] and doctor._PINS[1] == ROOT / "constraints.txt"
    assert all(name in pins for name in doctor.versions() if name not in OTHERS)
    same = pins | {"torch": f"{pins['torch']}+cpu", "trl": "not installed", "python": "3.99"}
    assert doctor.compared(same) == "as tested"
    other = {"torch": "99.1+cu130", "peft": "0.20.0", "transformers": "99.0.dev0"}
    other |= {"safetensors": pins["safetensors"]}
    monkeypatch.setattr(doctor, "versions", lambda: other)
    line = next(x for x in run("doctor").output.splitlines() if x.startswith("versions"))
    assert line.split(maxsplit=1)[1] == (
        f"note: newer than tested: torch 99.1 ({pins['torch']}), transformers 99.0.dev0 "
        f"({pins['transformers']}); older than tested: peft 0.20.0 ({pins['peft']})"
    )


def test_doctor_says_why_not(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    assert "error:" in run("doctor", "--model", tmp_path, expect=2).stderr


@pytest.mark.slow
def test_python_m_memwrap() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "memwrap", "train", "no-such-recipe"],
        cwd=ROOT, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    # Packages that are installed beside it would talk when they are imported (torchao does).
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert lines[0].startswith("error: There is no recipe")
    assert "Traceback" not in done.stderr


def test_only_the_first_of_several_processes_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others may be done before the first has written what it reports."""
    monkeypatch.setattr("memwrap.training.stages.run", lambda recipe: tmp_path)
    monkeypatch.setenv("RANK", "1")
    assert run("train", "armt_lora_tiny").output == ""
    (tmp_path / "run.json").write_text('{"seconds": 1.0}')
    monkeypatch.setenv("RANK", "0")
    assert "saved" in run("train", "armt_lora_tiny").output
