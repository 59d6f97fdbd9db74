"""The shape of the house: floors, sizes, and what no file of memwrap may contain."""

from __future__ import annotations

import ast
import inspect
import io
import re
import runpy
import tokenize
import tomllib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest
from packaging.version import Version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import memwrap

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {
    "memwrap": ROOT / "memwrap",
    "memwrap_kernels": ROOT / "kernels" / "torch-ext" / "memwrap_kernels",
}
MAX_LINES = 450
MAX_CODE = 60  # lines of a function, signature included; docstring, comments, blank lines are free

# Bottom up. A file imports from its own folder or from those below it, for types too.
FLOORS = (
    "memwrap_kernels",
    "io",
    "assets",
    "data",
    "ops",
    "state",
    "backbones",
    "stores",
    "memories",
    "engine",
    "model",
    "chat",
    "retrieval",
    "tasks",
    "training",
    "evaluation",
    "comparison",
    "exporting",
    "serving",
    "cli",
    "testing",
)
# The public names stand above all that they are made of; what is above them may use them.
PUBLIC = "memwrap"
USERS = {"training", "comparison", "exporting", "cli", "testing", "__main__"}


def _module(path: Path) -> str:
    """`memwrap/ops/__init__.py` -> `memwrap.ops`."""
    room = next(name for name, folder in ROOMS.items() if path.is_relative_to(folder))
    parts = path.relative_to(ROOMS[room]).with_suffix("").parts
    return ".".join([room, *(p for p in parts if p != "__init__")])


FILES = {
    _module(path): path
    for folder in ROOMS.values()
    for path in sorted(folder.rglob("*.py"))
    if "__pycache__" not in path.parts
}
# What the methods in memwrap/memories are made of.
SHARED = {"config", "parts", "protocol", "registry", "settings", "sizes"}
MEMORIES = sorted(
    name
    for name in FILES
    if name.startswith("memwrap.memories.") and name.split(".")[2] not in SHARED
)


def over(modules: Iterable[str]) -> Callable[[Callable[[str], None]], Callable[[], None]]:
    """Check all modules in one test: thousands of tests of a line each take a minute."""

    def decorate(check: Callable[[str], None]) -> Callable[[], None]:
        def test() -> None:
            wrong = []
            for module in modules:
                try:
                    check(module)
                except AssertionError as error:
                    wrong.append(f"{module}: {error}")
            assert not wrong, "\n".join(wrong)

        test.__name__, test.__doc__ = check.__name__, check.__doc__
        return test

    return decorate


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def _room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if parts[0] == "memwrap" and len(parts) > 1 else parts[0]


def _floor(module: str) -> int:
    room = _room(module)
    if room in (PUBLIC, "__main__"):
        return len(FLOORS)
    if room not in FLOORS:
        pytest.fail(f"{module} stands on no floor: give its folder one in FLOORS")
    return FLOORS.index(room)


def test_nothing_stands_loose() -> None:
    """At the top of memwrap there are folders, the public names and the entry point."""
    loose = {path.name for path in ROOMS["memwrap"].glob("*.py")}
    assert loose == {"__init__.py", "__main__.py"}


def test_every_floor_exists() -> None:
    assert {_room(module) for module in FILES} - {PUBLIC, "__main__"} == set(FLOORS)


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _statements(node: ast.AST, deferred: bool) -> Iterator[ast.AST]:
    """The statements that importing a module runs; `deferred` adds the bodies of functions and
    what is there for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.stmt, ast.ExceptHandler, ast.match_case)):
            continue
        if _is_for_types(child) and not deferred:
            continue
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) and not deferred:
            continue
        yield child
        yield from _statements(child, deferred)


@cache
def _sources(module: str, deferred: bool = True) -> set[str]:
    """What `module` imports: modules of the house, and others by the name they are asked for."""
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in _statements(_tree(module), deferred):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            source = ".".join([*(above if node.level else []), *([node.module or ""])]).strip(".")
            for alias in node.names:
                name = f"{source}.{alias.name}"
                found.add(name if name in FILES else source)
    return found


def _imported(module: str, deferred: bool = True) -> set[str]:
    """Modules of the house that `module` imports."""
    return {name for name in _sources(module, deferred) if name in FILES} - {module}


@over(FILES)
def test_imports_go_down(module: str) -> None:
    for other in sorted(_imported(module)):
        if (
            other == PUBLIC
        ):  # from within functions, or by the rooms that use memwrap as a user does
            assert _room(module) in USERS, f"{module} imports the public names; import their room"
            continue
        assert _floor(other) <= _floor(module), f"{module} imports {other}, which stands above it"


def test_no_import_cycle() -> None:
    graph = {module: sorted(_imported(module, deferred=False)) for module in FILES}
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        for other in graph[module]:
            visit(other, [*path, module])
        done.add(module)

    for module in graph:
        visit(module, [])


def test_the_checks_see_imports() -> None:
    """A guard on this file: were nothing found, nothing could fail."""
    assert {"memwrap.backbones", "memwrap.state.memory_state"} <= _imported("memwrap.engine.step")
    assert "memwrap.model.wrapping" in _imported("memwrap")
    assert MEMORIES


@over(MEMORIES)
def test_no_memory_imports_another(module: str) -> None:
    others = {m for m in _imported(module) if m.startswith("memwrap.memories.")}
    assert {other.split(".")[2] for other in others} <= SHARED


@over([m for m in FILES if m.startswith("memwrap.memories.")])
def test_no_memory_names_a_model_family(module: str) -> None:
    families = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    classes = {re.sub(r"(For\w+|LMHead\w*)$", "", n) for n in _class_names()}
    for node in ast.walk(_tree(module)):
        words = {getattr(node, field, None) for field in ("id", "attr", "arg", "name", "module")}
        named = {word for word in words if isinstance(word, str)}
        assert "model_type" not in named, f"{module} asks which family it serves"
        assert not any(word.startswith("transformers.models") for word in named), module
        for word in named:
            stem = re.match(r"[A-Z]\w*?(?=For|Model|Config|Attention|DecoderLayer)", word)
            assert not (stem and stem.group() in classes), f"{module} names {word}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value not in families, f"{module} names the family {node.value!r}"


def _class_names() -> Iterator[str]:
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        yield from [names] if isinstance(names, str) else names


# `memwrap.testing` is made of tests, and a test asserts; no other folder may import it.
LIBRARY = [module for module in FILES if _room(module) != "testing"]


@over(LIBRARY)
def test_the_library_needs_no_test_tools(module: str) -> None:
    roots = {name.partition(".")[0] for name in _sources(module)}
    assert not roots & {"pytest", "_pytest", "hypothesis"}, f"{module} imports what tests need"


@over(LIBRARY)
def test_no_assert_statement(module: str) -> None:
    lines = [node.lineno for node in ast.walk(_tree(module)) if isinstance(node, ast.Assert)]
    assert not lines, f"{module} asserts in lines {lines}; raise ValueError or TypeError"


@over(FILES)
def test_files_are_short(module: str) -> None:
    lines = FILES[module].read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"{module} has {lines} lines; the limit is {MAX_LINES}"


_NO_CODE = {
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
}  # fmt: skip


def _code_lines(text: str) -> Iterator[tuple[str, int]]:
    """Iterate over functions and methods: name, and lines of code without the docstring."""
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    lines = {n for t in tokens if t.type not in _NO_CODE for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inside = set(range(node.lineno, (node.end_lineno or 0) + 1)) & lines
            if ast.get_docstring(node) is not None:
                inside -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
            yield node.name, len(inside)


@over(FILES)
def test_functions_are_short(module: str) -> None:
    text = FILES[module].read_text(encoding="utf-8")
    long = {name: lines for name, lines in _code_lines(text) if lines > MAX_CODE}
    assert not long, f"{module}: at most {MAX_CODE} lines of code a function: {long}"


def test_lines_of_code_are_counted() -> None:
    """A guard on the test above."""
    head = 'def f(\n    x,\n):\n    """Say.\n\n    More.\n    """\n\n'
    text = head + "    # why\n    return (\n        x\n    )\n"
    assert list(_code_lines(text)) == [("f", 6)]


@over([m for m in FILES if FILES[m].stat().st_size])
def test_modules_begin_with_a_docstring(module: str) -> None:
    tree = _tree(module)
    assert ast.get_docstring(tree), f"{module} says nowhere what it is"
    assert tree.body[0].lineno == 1, f"{module} has something before its docstring"


# Names that stand in several folders, and why.
SHARED_MODULES = {
    "naive": "the specification of a family of ops",
    "chunked": "the fast torch of a family of ops",
    "op": "checks and choice of a family of ops",
    "base": "the base classes of a folder",
    "plots": "the figures of a folder",
    "check": "the check of what a folder writes",
    "compressive": "a memory, and its mathematics",
    "knnlm": "a memory, and how it is tuned",
    "recall": "the recall task, trained and measured",
}
SHARED_CLASSES = {"SavingMixin": "an exported model's own, instead of memwrap's"}


def test_modules_have_names_of_their_own() -> None:
    names: dict[str, list[str]] = {}
    for module, path in FILES.items():
        if module.startswith("memwrap.") and path.name != "__init__.py":
            names.setdefault(path.stem, []).append(module)
    assert {name for name, modules in names.items() if len(modules) > 1} == set(SHARED_MODULES)


def test_classes_have_names_of_their_own() -> None:
    names: dict[str, list[str]] = {}
    for module in LIBRARY:
        for node in _tree(module).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                names.setdefault(node.name, []).append(module)
    twice = {name: modules for name, modules in names.items() if len(modules) > 1}
    assert twice.keys() == SHARED_CLASSES.keys(), twice


def test_recall_is_a_task() -> None:
    """The word names the task of associative recall, and the parts that make and measure it."""
    for module in LIBRARY:
        if _room(module) in {"ops", "state", "backbones", "stores", "memories", "engine", "model"}:
            names = [n.name for n in ast.walk(_tree(module)) if hasattr(n, "name") and n.name]
            named = [n for n in [module, *names] if "recall" in n.lower()]
            assert not named, f"{module} calls something else recall: {named}"


# Words that point at something without saying what it is; no variable has such a name.
PRONOUNS = {"own", "found", "there", "that", "which", "what", "these", "those", "here"}


@over(FILES)
def test_variables_are_nouns(module: str) -> None:
    for node in ast.walk(_tree(module)):
        name = node.arg if isinstance(node, ast.arg) else ""
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            name = node.id
        assert name not in PRONOUNS, f"{module}: {name!r} in line {getattr(node, 'lineno', 0)}"


# Words that open a description of what is returned, not of what is done.
NO_VERBS = re.findall(
    r"\w+",
    """
    a all an any as at both class each every first for from how if in it its last least more most
    no none nothing of on one only other over same some such that the their these this those to two
    under what when where whether which who why with without
    accuracy attention batch column default entry float32 function index key length loss memory
    number perplexity position query result row segment shape size state tensor token value
    """,
)


def _begins_with_a_verb(text: str) -> bool:
    """Check the first word: neither code or a number, nor one of `NO_VERBS`, nor a plural or a
    third person (`Keys of ...`, `Returns ...`)."""
    word = re.match(r"[A-Z][a-z]+(-[a-z]+)*(?=[ ,.:;]|$)", text)
    if word is None:
        return False
    plain = word.group().lower()
    return plain not in NO_VERBS and not (plain.endswith("s") and not plain.endswith("ss"))


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    """Iterate over functions and methods; properties are named by what they are."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
            if "property" not in decorators:
                yield node


@over(LIBRARY)
def test_functions_say_what_they_do(module: str) -> None:
    texts = [(node.name, ast.get_docstring(node)) for node in _functions(_tree(module))]
    wrong = [
        f"{name}: {text[:60]}" for name, text in texts if text and not _begins_with_a_verb(text)
    ]
    assert not wrong, f"{module}: begin these docstrings with a verb: {wrong}"


@over(LIBRARY)
def test_classes_say_what_they_are(module: str) -> None:
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.ClassDef):
            text = ast.get_docstring(node) or "-"
            opening = re.split(r"[ ,.:;\n]", text)[0].lower()
            assert opening not in {
                "how",
                "what",
                "when",
                "where",
                "whether",
                "which",
                "who",
                "why",
            }, f"{module}.{node.name} begins with {opening!r}; begin with a noun"


def test_the_words_are_told_apart() -> None:
    """A guard on the two tests above."""
    for text in ("Compute the norm.", "Fine-tune it.", "Pass on `x`.", "Refuse:"):
        assert _begins_with_a_verb(text), text
    for text in (
        "What it is.",
        "Keys of all.",
        "Returns it.",
        "`(B, T)` ids.",
        "The sum.",
        "1 if so.",
    ):
        assert not _begins_with_a_verb(text), text


@over(FILES)
def test_nothing_is_pickled(module: str) -> None:
    """Files of others are read: loading one must never run code."""
    refused = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            roots = {alias.name.split(".")[0] for alias in node.names}
            assert not roots & refused, f"{module} imports {roots & refused}"
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").split(".")[0] not in refused, f"{module}: {node.module}"
            if node.module == "torch":
                assert not {alias.name for alias in node.names} & {"save", "load"}, module
        elif isinstance(node, ast.Attribute) and node.attr in ("save", "load"):
            owner = node.value
            assert not (isinstance(owner, ast.Name) and owner.id == "torch"), (
                f"{module} line {node.lineno}: torch.{node.attr} pickles; use safetensors"
            )


def test_kernels_is_no_package() -> None:
    """A top-level `kernels` would shadow Hugging Face's package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_public_names() -> None:
    assert memwrap.__all__ == sorted(memwrap.__all__)
    assert len(set(memwrap.__all__)) == len(memwrap.__all__)
    for name in memwrap.__all__:
        assert hasattr(memwrap, name), f"memwrap.__all__ lists {name}, which is not there"


def test_public_names_come_from_where_type_checkers_see_them() -> None:
    block = next(node for node in _tree("memwrap").body if _is_for_types(node))
    imports = [node for node in ast.walk(block) if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == memwrap._PLACES
    assert seen.keys() | {"__version__"} == set(memwrap.__all__)


@pytest.mark.parametrize("name", [n for n in memwrap.__all__ if not n.startswith("__")])
def test_public_names_are_documented(name: str) -> None:
    public = getattr(memwrap, name)
    text = public.__doc__ or ""
    # A dataclass without a docstring gets its signature as one.
    assert text.strip() and not text.startswith(f"{name}("), f"memwrap.{name} has no docstring"
    if not inspect.isclass(public):
        return
    for attribute, value in vars(public).items():
        # Properties may speak for themselves (`segment_size`), and what overrides a method of
        # transformers is documented there.
        called = inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod))
        inherited = any(hasattr(parent, attribute) for parent in public.__mro__[1:])
        # What a check of a config refuses is said by its error.
        if called and not inherited and not attribute.startswith(("_", "validate_")):
            assert inspect.getdoc(getattr(public, attribute)), f"{name}.{attribute} is undocumented"


def test_the_project_file() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == memwrap.__version__
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    pinned = set(re.findall(r"^([a-z0-9.-]+)==", pins, re.MULTILINE))
    needed = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    needed += project["optional-dependencies"]["train"]
    for requirement in needed:
        name = re.match(r"[A-Za-z0-9_.-]+", requirement).group().lower().replace("_", "-")  # type: ignore[union-attr]
        assert name in pinned | {"memwrap"}, f"constraints.txt does not pin {name}"


def test_lower_bounds_are_not_above_the_tested_versions() -> None:
    """`make test-lowest` installs them, from the list that this reads."""
    read = runpy.run_path(str(ROOT / ".ci" / "lower_bounds.py"))["lower_bounds"]
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower().replace("_", "-")
    tested = dict(re.findall(r"^([a-z0-9.-]+)==(\S+)", pins, re.MULTILINE))
    bounds = read()
    assert {"torch", "transformers", "peft", "datasets", "pytest"} <= bounds.keys()
    for name in bounds.keys() & tested.keys():
        assert Version(bounds[name]) <= Version(tested[name]), name


def test_a_dependency_without_a_lower_bound_is_refused(tmp_path: Path) -> None:
    read = runpy.run_path(str(ROOT / ".ci" / "lower_bounds.py"))["lower_bounds"]
    path = tmp_path / "pyproject.toml"
    head = '[project]\nname = "memwrap"\n[project.optional-dependencies]\nx = ["memwrap[y]"]\n'
    for needed, words in (('"a"', "no lower bound"), ('"a>=1", "a>=2"', "two lower bounds")):
        path.write_text(head.replace("\n[project.", f"\ndependencies = [{needed}]\n[project."))
        with pytest.raises(ValueError, match=words):
            read(path)
