"""A memory of another package: installed, it can all that memwrap's own can.

Each test is one process that knows of the package nothing but that it is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support import save_small_base

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(__file__).parent / "ema_memory"
RECIPE = """
task: finetune
output: run
model: {name: base, dtype: float32}
memory: {name: ema, segment_size: 16, decay: 0.25}
lora: {r: 2, target_modules: all-linear}
data: {source: texts, max_tokens: 64, min_tokens: 16}
trainer: {steps: 2, batch_size: 2, learning_rate: 1e-3}
"""
COMMANDS = """
import sys
import memwrap, torch
from typer.testing import CliRunner
from memwrap.cli.app import app

def run(*words):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output
"""
FIRST = (
    COMMANDS
    + """
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

assert "ema" in memwrap.available() and "rmt" in memwrap.available()
assert "ema_memory" not in sys.modules  # named without being imported
assert "saved run: 2 steps" in run("train", "recipe.yaml")
assert memwrap.config_class("ema")(decay=0.25).decay == 0.25
base = AutoModelForCausalLM.from_pretrained("base")
model = memwrap.wrap(base, "ema", segment_size=16, decay=0.25).eval()
ids = torch.randint(4, 99, (2, 40), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    logits = model(ids).logits
    assert not torch.equal(logits, model(ids, memory_control="off").logits)
model.save_pretrained("model")
model.read(ids[:, :24]).save("state.safetensors")
save_file({"ids": ids, "logits": logits}, "expected.safetensors")
"""
)
SECOND = (
    COMMANDS
    + """
from safetensors.torch import load_file

assert "ema_memory" not in sys.modules
model, expected = memwrap.load("model"), load_file("expected.safetensors")
assert [type(c).__module__ for c in model.memory_configs] == ["ema_memory"]
with torch.no_grad():
    assert torch.equal(model(expected["ids"]).logits, expected["logits"])
    state = memwrap.MemoryState.load("state.safetensors", model)
    tail = model(expected["ids"][:, 24:], cache=state).logits
assert (tail - expected["logits"][:, 24:]).abs().max() < 1e-5

assert "ema             tokens          One vector that follows" in run("list")
print(run("doctor", "--model", "base"))
print(run("eval", "run", "--documents", "texts", "--split", "all", "--tokens", "64"))
print(run("export", "run", "exported"))
again = memwrap.load("exported")
with torch.no_grad():
    got, want = again(expected["ids"]).logits, memwrap.load("run")(expected["ids"]).logits
assert (got - want).abs().max() < 1e-4 * want.abs().max()
"""
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model, texts and a recipe, and the package installed in `site`."""
    folder = tmp_path_factory.mktemp("plugins")
    save_small_base(folder / "base")
    (folder / "texts").mkdir()
    for number in range(4):
        (folder / "texts" / f"{number}.txt").write_text(f"Text {number} says something. " * 40)
    (folder / "recipe.yaml").write_text(RECIPE)
    shutil.copytree(PACKAGE, folder / "ema_memory")  # a build leaves files beside the source
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", "site"]
    options += ["--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "./ema_memory"],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.rmtree(folder / "ema_memory")
    # memwrap's own entry point as pyproject.toml has it: an environment may be older than that.
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    metadata = folder / "site" / "memwrap_declared-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: memwrap-declared\n")
    lines = [f"{name} = {value}" for name, value in points["pytest11"].items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[pytest11]", *lines]))
    return folder


def run(place: Path, *words: str) -> str:
    """What a fresh Python prints that finds the package."""
    paths = [str(place / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *words],
        cwd=place, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_is_wrapped_trained_loaded_measured_and_exported(place: Path) -> None:
    run(place, "-c", FIRST)
    printed = run(place, "-c", SECOND)
    assert re.search(r"^ema-memory +0\.1 \(memory ema\)$", printed, re.MULTILINE)
    assert re.search(r"^ema +works$", printed, re.MULTILINE)
    assert "| memory off |" in printed  # the table of eval
    assert "loads without memwrap: logits within" in printed
    assert "generates the same ids" in printed
    exported = {path.name for path in (place / "exported").iterdir()}
    assert {"ema_memory.py", "modeling_memwrap.py"} <= exported
    card = (place / "exported" / "README.md").read_text()
    assert "modules of memwrap (Apache-2.0) and ema_memory (ema-memory 0.1, MIT)" in card


def test_the_invariants_run_on_it(place: Path) -> None:
    """From a folder that has no settings of pytest."""
    words = ["-q", "--pyargs", "memwrap.testing", "--memory", "ema", "--family", "llama"]
    printed = run(place, "-m", "pytest", "-p", "no:cacheprovider", *words)
    found = re.search(r"(\d+) passed, \d+ deselected", printed)
    assert found and int(found[1]) > 70, printed
