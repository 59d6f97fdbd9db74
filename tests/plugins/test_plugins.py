"""A memory of another package can do all that memwrap's own can: that of docs/howto/add_a_memory.md
is installed, and the page's commands are run in processes that know nothing of it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(__file__).parent / "ema_memory"
PAGE = (ROOT / "docs" / "howto" / "add_a_memory.md").read_text(encoding="utf-8")
QUICK = ["-k", "test_split or test_causality or test_round_trips"]


def blocks(language: str) -> list[str]:
    """The page's fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


# What the page says to type, without its comments.
COMMANDS = [shlex.split(line, comments=True) for line in "".join(blocks("bash")).splitlines()]
SCRIPT = f"""
import json, sys
import memwrap, torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner
from memwrap.cli.app import app

COMMANDS = {[words[1:] for words in COMMANDS if words[0] == "memwrap"]}

def run(name, *more):
    words = next(words for words in COMMANDS if words[0] == name)
    result = CliRunner().invoke(app, [*words, *more])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.output

def logits_of(model, **kwargs):
    with torch.no_grad():
        return model.eval()(ids, **kwargs).logits

assert "ema" in memwrap.available() and "rmt" in memwrap.available()
assert "ema_memory" not in sys.modules  # named without being imported
ids = torch.randint(4, 99, (2, 160), generator=torch.Generator().manual_seed(0))
"""
FIRST = f"""
assert "saved runs/ema: 2 of 2 steps" in run("train", "trainer.steps=2")
print(run("list"), run("doctor"))
{blocks("python")[1]}
assert model.memory_configs[0].segment_size == 64
assert not torch.equal(logits_of(model), logits_of(model, memory_control="off"))
model.read(ids).save("state.safetensors")
answer = logits_of(model, cache=model.read(ids))
save_file({{"read": logits_of(model), "answer": answer}}, "expected.safetensors")
"""
SHORT = """
from memwrap.testing.helpers import wrapped
model = wrapped("ema")
assert [type(c).__module__ for c in model.memory_configs] == ["ema_memory"]
assert not torch.equal(logits_of(model), logits_of(model, memory_control="off"))
model.save_pretrained("short", include_base=True)
assert torch.equal(logits_of(memwrap.load("short")), logits_of(model))
"""
SECOND = """
model, expected = memwrap.load("my-model"), load_file("expected.safetensors")
assert [type(c).__module__ for c in model.memory_configs] == ["ema_memory"]
assert torch.equal(logits_of(model), expected["read"])
state = memwrap.MemoryState.load("state.safetensors", model)
assert torch.equal(logits_of(model, cache=state), expected["answer"])
print(run("eval"), run("export"))
got, want = logits_of(memwrap.load("exported")), logits_of(memwrap.load("runs/ema"))
assert (got - want).abs().max() < 1e-4 * want.abs().max()
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's recipe, and the page's package installed in `site`."""
    folder = tmp_path_factory.mktemp("plugins")
    shutil.copytree(PACKAGE, folder / "source")  # a build leaves files beside it
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", "site"]
    options += ["--disable-pip-version-check"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, "./source"],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.move(folder / "source" / "ema.yaml", folder)
    shutil.rmtree(folder / "source")
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


@pytest.mark.parametrize(
    ("language", "file"),
    [("toml", "pyproject.toml"), ("python", "ema_memory.py"), ("yaml", "ema.yaml")],
)
def test_the_page_shows_the_files(language: str, file: str) -> None:
    assert blocks(language)[0] == (PACKAGE / file).read_text(encoding="utf-8")


@pytest.mark.slow
def test_it_is_wrapped_trained_loaded_measured_and_exported(place: Path) -> None:
    printed = run(place, "-c", SCRIPT + FIRST) + run(place, "-c", SCRIPT + SECOND)
    for line in (
        r"ema +prompt, segment +One vector that follows",  # list
        r"memory ema +ema-memory 0\.1$",  # doctor
        r"ema +works$",
        r"\| memory off \| ",  # eval
        r"loads without memwrap: logits within .*, generates the same ids$",  # export
    ):
        assert re.search(rf"^ *{line}", printed, re.MULTILINE), (line, printed)
    exported = {path.name for path in (place / "exported").iterdir()}
    assert {"ema_memory.py", "modeling_memwrap.py"} <= exported
    card = (place / "exported" / "README.md").read_text()
    assert "modules of memwrap (Apache-2.0) and ema_memory (ema-memory 0.1, MIT)" in card


@pytest.mark.slow
def test_it_is_found_without_an_import(place: Path) -> None:
    """What `make test` shows of it: a fresh process wraps, reads, saves and loads."""
    run(place, "-c", SCRIPT + SHORT)


@pytest.mark.parametrize(
    "more",
    [pytest.param(QUICK, marks=pytest.mark.slow), pytest.param([], marks=pytest.mark.full)],
)
def test_the_invariants_run_on_it(place: Path, more: list[str]) -> None:
    """From a folder that has no settings of pytest, by the page's own command."""
    command = next(words for words in COMMANDS if words[0] == "pytest")
    printed = run(place, "-m", *command, "-p", "no:cacheprovider", *more)
    found = re.search(r"(\d+) passed, \d+ deselected", printed)
    assert found and int(found[1]) >= (30 if more else 60), printed
