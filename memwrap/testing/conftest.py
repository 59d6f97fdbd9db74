"""Options and rules of the invariants: which memories and families, one thread
(`MEMWRAP_TEST_THREADS` for another number), fixed seeds.

Warnings are errors, whatever the project says that the tests are run from.
"""

from __future__ import annotations

import gc
import os
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import memwrap
from memwrap.memories.protocol import PLACES, places_of
from memwrap.memories.registry import installed, memory_class
from memwrap.testing import margins
from memwrap.testing.families import FAMILIES

HERE = Path(__file__).parent
# Where a family makes a difference: soft caps, layers that do not rotate, a table of positions,
# recurrent layers.
BRANCHES = {
    "gemma2": {"attention"},
    "smollm3": {"attention"},
    "gpt2": {"prompt", "inserted"},
    "qwen3_next": set(PLACES),
    "lfm2": {"attention"},
}
# Where nothing but attention is another: those memories that make something of it.
ONLY_ATTENTION = {
    "gpt_oss": {"extended_mind", "landmark"},
    "deepseek_v2": {"ahn", "landmark"},
}
# Older releases of Hypothesis ask the garbage collector who holds their generator, and it does not
# tell of what is frozen (`pytest_collection_finish`).
NO_REFERRER = "ignore:It looks like `register_random`:hypothesis.errors.HypothesisWarning"
MARKERS = (
    "full: the whole product of methods and families; off unless -m names it",
    "slow: long processes, of which others show less; off unless -m names it",
    "pairs(reach, families, having): run on every pair of a memory and a family",
    "long: `slow` for all memories but one of each place and those that were asked for",
)

torch.set_num_threads(int(os.environ.get("MEMWRAP_TEST_THREADS", "1")))
settings.register_profile("memwrap", deadline=None, derandomize=True, print_blob=False)
settings.load_profile("memwrap")
margins.install()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("memwrap", "the invariants of memories")
    group.addoption(
        "--memory",
        action="append",
        metavar="NAME",
        help="run the invariants on this memory; may be repeated (default: all available)",
    )
    group.addoption(
        "--family",
        action="append",
        choices=FAMILIES,
        metavar="NAME",
        help="only on this family of models, all tests of it; may be repeated (default: llama, "
        "and pairs that meet other code; all with -m 'full or not full')",
    )


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    for name in config.getoption("memory", None) or ():
        try:
            memwrap.config_class(name)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from error


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that takes a `memory` on all that were asked for, by `pairs` on families too."""
    if "memory" not in metafunc.fixturenames:
        return
    memories = metafunc.config.getoption("memory", None) or _available()
    mark = metafunc.definition.get_closest_marker("pairs")
    if mark is None:
        metafunc.parametrize("memory", memories)
        return
    if having := mark.kwargs["having"]:
        memories = [name for name in memories if getattr(memory_class(name), having)]
    named = metafunc.config.getoption("family", None) or ()
    reach, asked = mark.kwargs["reach"], metafunc.config.getoption("memory", None)
    chosen = {
        (memory, family)
        for memory in memories
        for family in mark.kwargs["families"]
        if family in ("llama", *named)
        or (reach != "llama" and (asked or meets(memory, family, reach == "branches")))
    }
    # Where nobody asked for marks, what is `full` is not made: it would be two thirds of all.
    cases = [
        pytest.param(
            memory, family, id=f"{memory}-{family}",
            marks=() if (memory, family) in chosen else pytest.mark.full,
        )
        for memory in memories
        for family in mark.kwargs["families"]
        if (memory, family) in chosen or metafunc.config.getoption("markexpr", "")
    ]  # fmt: skip
    metafunc.parametrize(("memory", "family"), cases)


def _beyond_a_sample(item: pytest.Item) -> bool:
    """Whether a test takes long and its memory is none of the few; a fixture may name it."""
    if item.get_closest_marker("long") is None:
        return False
    parameters = item.callspec.params  # type: ignore[attr-defined]
    return parameters.get("memory", parameters.get("model")) not in set().union(*_kinds())


@cache
def meets(memory: str, family: str, branches: bool) -> bool:
    """Whether a pair meets code that the memory meets on no family before: a memory for each place
    on every family, and with `branches` all of a place where the family makes a difference to it;
    fewer where attention alone is another; those of other packages everywhere."""
    foreign, few = _kinds()
    if memory in foreign:
        return True
    if family in ONLY_ATTENTION:
        return memory in ONLY_ATTENTION[family]
    places = {*places_of(memory_class(memory))} if branches else set()
    return memory in few or bool(BRANCHES.get(family, set()) & places)


@cache
def _available() -> list[str]:
    """All names, looked for once."""
    return memwrap.available()


@cache
def _kinds() -> tuple[set[str], set[str]]:
    """Memories of other packages, and few of the others that stand in every place."""
    foreign = set(installed().names)
    places = {name: {*places_of(memory_class(name))} for name in sorted({*_available()} - foreign)}
    few: set[str] = set()
    missing = set().union(*places.values())
    while missing:
        most = max(places, key=lambda name: len(places[name] & missing))
        few.add(most)
        missing -= places[most]
    return foreign, few


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is `full` or `slow`, unless marks were asked for, and families that were not
    named. What is `long` is `slow` on most memories, unless some were named."""
    unasked = not config.getoption("markexpr", "")
    if not config.getoption("memory", None):
        for item in filter(_beyond_a_sample, items):
            item.add_marker("slow")
    named = config.getoption("family", None)
    chosen: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        left = unasked and ("full" in item.keywords or "slow" in item.keywords)
        if item.path.parent == HERE:
            # In front of a test's own filters, which then have the last word.
            for rule in (NO_REFERRER, "error"):
                item.add_marker(pytest.mark.filterwarnings(rule), append=False)
            left = left or (named and _family(item) not in named)
        (others if left else chosen).append(item)
    if others:
        config.hook.pytest_deselected(items=others)
        items[:] = chosen


def pytest_collection_finish() -> None:
    """Keep the garbage collector from the objects of modules and collected tests: a twentieth of
    the time."""
    gc.collect()
    gc.freeze()


def _family(item: pytest.Item) -> str:
    """The family of a test; llama is what tests without one build."""
    parameters = getattr(item, "callspec", None)
    return parameters.params.get("family", "llama") if parameters else "llama"


@pytest.fixture(autouse=True)
def seeds() -> None:
    torch.manual_seed(1234)
