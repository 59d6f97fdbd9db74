"""Names of memories: those of other packages, and what happens where two have one name."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from support import refused
from typer.testing import CliRunner

import memwrap
from memwrap.cli.app import app
from memwrap.memories import registry
from memwrap.testing.families import build

SOURCE = """
from dataclasses import dataclass
from typing import ClassVar
from memwrap.memories.registry import register
from memwrap.memories.rmt import RMTConfig, RMTMemory

@dataclass(kw_only=True)
class OtherConfig(RMTConfig):
    '''Another recurrent memory.'''
    name: ClassVar[str] = {name!r}

@register(OtherConfig)
class OtherMemory(RMTMemory):
    pass
"""


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers or imports is forgotten after it."""
    memwrap.available()
    monkeypatch.setattr(registry, "_MEMORIES", dict(registry._MEMORIES))
    monkeypatch.setattr(registry, "_RESOLVED", set())
    yield
    for module in ("mine", "yours", "canary", "cell", "elsewhere"):
        sys.modules.pop(module, None)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def install(site: Path, package: str, source: str, **points: str) -> None:
    """A package of one module, as pip leaves it."""
    (site / f"{package}.py").write_text(source)
    metadata = site / f"{package}-1.5.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.5\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (metadata / "entry_points.txt").write_text("\n".join([f"[{registry.GROUP}]", *lines]))


def test_a_package_is_imported_when_its_memory_is_asked_for(site: Path) -> None:
    install(site, "mine", SOURCE.format(name="other"), other="mine:OtherMemory")
    assert "other" in memwrap.available()
    memwrap.config_class("rmt")
    assert "mine" not in sys.modules
    assert registry.memory_class("other").__module__ == "mine"
    assert memwrap.wrap(build("llama"), "other", segment_size=8).memory_configs[0].name == "other"


def test_two_packages_of_one_name(site: Path) -> None:
    install(site, "mine", SOURCE.format(name="other"), other="mine:OtherMemory")
    install(site, "yours", SOURCE.format(name="other"), other="yours:OtherMemory")
    assert memwrap.available().count("other") == 1
    for _ in range(2):  # the answer stays what it was
        with refused(r"mine\.OtherMemory", r"yours\.OtherMemory"):
            memwrap.config_class("other")


def test_a_package_that_takes_the_name_of_ours(site: Path) -> None:
    install(site, "mine", SOURCE.format(name="rmt"), rmt="mine:OtherMemory")
    with refused(r"mine\.OtherMemory", r"memwrap\.memories\.rmt\.RMTMemory"):
        memwrap.wrap(build("llama"), "rmt")
    assert memwrap.config_class("armt").name == "armt"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import no_such_module", ("ModuleNotFoundError", "no_such_module")),
        ("1 / 0", ("ZeroDivisionError",)),
        ("x = 1", ("AttributeError", "OtherMemory")),
        ("class OtherMemory: pass", ("not registered", "@register")),
        (SOURCE.format(name="another"), ("not registered", "'other'")),
    ],
)
def test_a_broken_package_is_named_and_harms_no_other(
    site: Path, source: str, words: tuple[str, ...]
) -> None:
    install(site, "mine", source, other="mine:OtherMemory")
    assert "other" in memwrap.available()
    for _ in range(2):
        with refused("mine 1.5", "'other'", "mine:OtherMemory", *words):
            memwrap.config_class("other")
    assert memwrap.config_class("rmt").name == "rmt"
    listed = CliRunner().invoke(app, ["list"])
    assert listed.exit_code == 0
    rows = {line.split()[0]: line.split()[1] for line in listed.output.splitlines()}
    assert rows["other"] == "broken" and rows["rmt"] == "prompt"


def run(source: str, module: str) -> ModuleType:
    sys.modules[module] = made = ModuleType(module)
    exec(source, vars(made))
    return made


def test_a_cell_may_run_again_and_a_twin_may_not() -> None:
    first = run(SOURCE.format(name="other"), "cell")
    again = run(SOURCE.format(name="other"), "cell")
    assert memwrap.config_class("other") is again.OtherConfig is not first.OtherConfig
    # Names of classes alone would not tell the two apart.
    with refused(r"cell\.OtherMemory", r"elsewhere\.OtherMemory", "'other'"):
        run(SOURCE.format(name="other"), "elsewhere")
    assert memwrap.config_class("other") is again.OtherConfig


@pytest.mark.parametrize("name", ["", "my-memory", "a.b", 3])
def test_names_are_identifiers(name: object) -> None:
    with refused("OtherConfig.name", "identifier"):
        run(SOURCE.format(name=name), "cell")


@pytest.mark.parametrize("name", ["canary", "canary:Memory", "canary.Memory", "mine:OtherMemory"])
def test_a_saved_config_imports_nothing_by_its_path(site: Path, name: str) -> None:
    """It may only name what an installed package declares."""
    install(site, "mine", SOURCE.format(name="other"), other="mine:OtherMemory")
    (site / "canary.py").write_text("class Memory: pass")
    folder = site / "model"
    memwrap.wrap(build("llama"), "rmt", segment_size=8).save_pretrained(folder)
    values = json.loads((folder / "config.json").read_text())
    values["memories"][0]["name"] = name
    values.pop("sealed")  # whoever writes a file can
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="Unknown memory"):
        memwrap.load(folder, build("llama"))
    assert not {"canary", "mine"} & sys.modules.keys()
