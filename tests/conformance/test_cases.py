"""The reference vectors as a whole: every folder has a runner or is named as not built, and runners
use all that a case says."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import FOLDERS, NOT_BUILT, OWN, Case, Entries, names_of, read_case

HERE = Path(__file__).parent
# Which file runs a method, by its own words.
RUNNERS = {
    method: path.stem
    for path in sorted(HERE.glob("test_*.py"))
    if path != Path(__file__)
    for method in re.findall(r'names_of\("(\w+)"\)', path.read_text(encoding="utf-8"))
}
# One case of every kind that a method has.
KINDS = [
    pytest.param(
        method, next(n for n in names_of(method) if n.startswith(kind)), id=f"{method}-{kind}"
    )
    for method in RUNNERS
    for kind in sorted({n.split("_")[0] for n in names_of(method)})
]


def checker(method: str) -> Callable[[Case], None]:
    return importlib.import_module(RUNNERS[method]).check


@pytest.mark.parametrize("folder", [*FOLDERS, OWN], ids=str)
def test_every_folder_is_run_or_named_as_not_built(folder: Path) -> None:
    assert folder.is_dir(), f"{folder} is no folder"
    found = {path.name for path in folder.iterdir() if path.is_dir()}
    unknown = sorted(found - RUNNERS.keys() - NOT_BUILT)
    assert not unknown, (
        f"no runner reads {unknown} of {folder}, and cases.NOT_BUILT does not name it"
    )


def test_nothing_that_is_run_is_called_not_built() -> None:
    assert not NOT_BUILT & RUNNERS.keys()


@pytest.mark.parametrize(("method", "name"), KINDS)
def test_what_a_runner_does_not_know_is_named(method: str, name: str) -> None:
    """A setting, a part of one, and a tensor."""
    case = read_case(method, name)
    case.settings["strange_setting"] = 3
    with pytest.raises(AssertionError, match="strange_setting"):
        checker(method)(case)
    case = read_case(method, name)
    case.tensors["strange_tensor"] = torch.ones(1)
    with pytest.raises(AssertionError, match="strange_tensor"):
        checker(method)(case)
    case = read_case(method, name)
    if isinstance(case.settings.get("base"), Entries):
        case.settings.peek("base")["strange_part"] = 3
        with pytest.raises(AssertionError, match=r"base\.strange_part"):
            checker(method)(case)
