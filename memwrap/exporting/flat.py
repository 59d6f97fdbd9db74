"""The code of a model as flat files that import each other and nothing of memwrap.

transformers copies such files beside a checkpoint's own modeling file if they are imported as
`from .name import ...`. The files are memwrap's own modules, as they are, with the imports changed:
there is no second version of the code that could differ.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import memwrap

ROOT = Path(memwrap.__file__).parent.parent
# What only the library needs (adapters, bases by name, the list of all memories) is replaced.
REPLACED = {
    "memwrap.model.saving": "memwrap.exporting.standalone",
    "memwrap.memories.registry": "memwrap.exporting.names",
}
NAMES = {
    "memwrap.model.memory_model": "modeling_memwrap",
    "memwrap.model.configuration": "configuration_memwrap",
}
# transformers brings the others.
ALLOWED = {"torch", "transformers", "safetensors", "huggingface_hub", "tqdm", "numpy"}
END = "\n\nimport sys  # noqa: E402\n\nTHIS_MODULE = sys.modules[__name__]\n"


def flat_files(memories: list[str]) -> dict[str, str]:
    """File names and their text: the model's code with everything it imports.

    Args:
        memories: modules of the memories, `memwrap.memories.rmt`.

    Raises:
        ValueError: if the code needs packages that transformers does not bring.
    """
    found: dict[str, str] = {}
    waiting = ["memwrap.model.memory_model", *memories]
    while waiting:
        module = waiting.pop()
        name = f"{flat_name(module)}.py"
        if name in found:
            continue
        text, needed = rewritten(_path(REPLACED.get(module, module)).read_text(encoding="utf-8"))
        found[name] = text + END
        waiting += needed
    # Importing a memory registers it.
    own = "".join(f"from .{flat_name(m)} import THIS_MODULE as _{flat_name(m)}\n" for m in memories)
    found["modeling_memwrap.py"] += f"\n{own}"
    return found


def flat_name(module: str) -> str:
    """`memwrap.ops.infini` -> `memwrap_ops_infini`."""
    return NAMES.get(module, module.replace(".", "_"))


def rewritten(text: str) -> tuple[str, list[str]]:
    """A module's text with its imports of memwrap made relative, and the modules it needs.

    Imports for type checkers alone are dropped; those of the Triton kernels stay lazy and become
    calls, so that nothing asks for the kernels where they are not installed.
    """
    lines = text.splitlines()
    needed: list[str] = []
    changes: list[tuple[ast.stmt, list[str]]] = []
    for node in _statements(ast.parse(text)):
        new: list[str] | None = None
        if isinstance(node, ast.If) and _for_types(node):
            new = []
        elif isinstance(node, ast.ImportFrom) and node.module:
            new = _from_import(node, needed)
        elif isinstance(node, ast.Import):
            new = _plain_import(node)
        if new is not None:
            changes.append((node, new))
    for node, new in sorted(changes, key=lambda change: -change[0].lineno):
        indent = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [indent + line for line in new]
    return "\n".join(lines), needed


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """All statements, those within blocks for type checkers left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        if not _for_types(child):
            yield from _statements(child)


def _from_import(node: ast.ImportFrom, needed: list[str]) -> list[str] | None:
    module = node.module or ""
    if module.partition(".")[0] == "memwrap_kernels":
        return [_kernel(f"{module}.{a.name}", a.asname or a.name) for a in node.names]
    if module.partition(".")[0] != "memwrap":
        _allow(module)
        return None
    lines = []
    for alias in node.names:
        inner, shown = f"{module}.{alias.name}", alias.asname or alias.name
        if _path(inner, check=False) is not None:
            needed.append(inner)
            lines.append(f"from .{flat_name(inner)} import THIS_MODULE as {shown}")
        else:
            needed.append(module)
            lines.append(f"from .{flat_name(module)} import {alias.name} as {shown}")
    return lines


def _plain_import(node: ast.Import) -> list[str] | None:
    heads = {alias.name.partition(".")[0] for alias in node.names}
    if "memwrap" in heads:
        raise ValueError("Code that imports memwrap as a whole cannot be exported.")
    if "memwrap_kernels" not in heads:
        for head in heads:
            _allow(head)
        return None
    return [_kernel(alias.name, alias.asname or alias.name) for alias in node.names]


def _allow(module: str) -> None:
    head = module.partition(".")[0]
    if head not in ALLOWED and head not in sys.stdlib_module_names:
        raise ValueError(
            f"The memory's code needs the package {head}, so it cannot be exported to run with "
            "torch and transformers alone; save the model and load it with memwrap."
        )


def _kernel(module: str, shown: str) -> str:
    return f'{shown} = __import__("importlib").import_module("{module}")'


def _path(module: str, *, check: bool = True) -> Path:
    """The file of a module of memwrap; None for another name, unless checked."""
    base = ROOT.joinpath(*module.split("."))
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    if check:
        raise ValueError(f"{module} is no module of memwrap; it cannot be exported.")
    return None  # type: ignore[return-value]
