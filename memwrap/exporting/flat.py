"""The code of a model as flat files that import each other and nothing of memwrap.

transformers copies such files beside a checkpoint's own modeling file if they are imported as
`from .name import ...`. The files are memwrap's own modules, and those of the packages that bring
the model's memories, as they are, with the imports changed: there is no second version of the
code that could differ.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import memwrap

# What only the library needs (adapters, bases by name, the list of all memories) is replaced.
REPLACED = {
    "memwrap.model.saving": "memwrap.exporting.standalone",
    "memwrap.model.adapter_switches": "memwrap.exporting.plain_adapters",
    "memwrap.backbones.adapters": "memwrap.exporting.plain_adapters",
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
    """Collect file names and their text: the model's code with everything it imports.

    Args:
        memories: modules of the memories: `memwrap.memories.rmt`, or of another package.

    Raises:
        ValueError: if the code needs packages that transformers does not bring, or has no source.
    """
    packages = {"memwrap", *(module.partition(".")[0] for module in memories)}
    files: dict[str, str] = {}
    origins: dict[str, str] = {}
    waiting = ["memwrap.model.memory_model", *memories]
    while waiting:
        module = waiting.pop()
        name = f"{flat_name(module)}.py"
        if origins.setdefault(name, module) != module:
            raise ValueError(f"{origins[name]} and {module} would both be exported as {name}.")
        if name in files:
            continue
        path = _source(REPLACED.get(module, module))
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        text, needed = rewritten(path.read_text(encoding="utf-8"), module, package, packages)
        files[name] = text + END
        waiting += needed
    # Importing a memory registers it.
    imports = "".join(
        f"from .{flat_name(m)} import THIS_MODULE as _{flat_name(m)}\n" for m in memories
    )
    files["modeling_memwrap.py"] += f"\n{imports}"
    return files


def flat_name(module: str) -> str:
    """Flatten a module's name: `memwrap.ops.infini` -> `memwrap_ops_infini`."""
    return NAMES.get(module, module.replace(".", "_"))


def rewritten(
    text: str,
    module: str = "memwrap",
    package: str = "memwrap",
    packages: Collection[str] = ("memwrap",),
) -> tuple[str, list[str]]:
    """Rewrite a module's text with its imports of what is exported made flat; also gives the
    modules it needs.

    Imports for type checkers alone are dropped; those of the Triton kernels stay lazy and become
    calls, so that nothing asks for the kernels where they are not installed.

    Args:
        text: of the module.
        module: its name, for errors.
        package: what its relative imports start from.
        packages: top-level packages whose code is exported.

    Raises:
        ValueError: for an import that cannot be exported.
    """
    lines = text.splitlines()
    imports = _Imports(module, package, packages)
    changes: list[tuple[ast.stmt, list[str]]] = []
    for node in _statements(ast.parse(text)):
        new: list[str] | None = None
        if isinstance(node, ast.If) and _for_types(node):
            new = []
        elif isinstance(node, ast.ImportFrom):
            new = imports.of_from(node)
        elif isinstance(node, ast.Import):
            new = imports.of_import(node)
        if new is not None:
            changes.append((node, new))
    for node, new in sorted(changes, key=lambda change: -change[0].lineno):
        indent = " " * node.col_offset
        lines[node.lineno - 1 : node.end_lineno] = [indent + line for line in new]
    return "\n".join(lines), imports.needed


def _for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _statements(node: ast.AST) -> Iterator[ast.stmt]:
    """Iterate over all statements, those within blocks for type checkers left out."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):
            yield child
        if not _for_types(child):
            yield from _statements(child)


@dataclass
class _Imports:
    """The import statements of one module; `needed` collects the exported modules they name."""

    module: str
    package: str
    packages: Collection[str]
    needed: list[str] = field(default_factory=list)

    def of_from(self, node: ast.ImportFrom) -> list[str] | None:
        """Rewrite `from ... import ...`; None leaves it as it is."""
        name = "." * node.level + (node.module or "")
        source = importlib.util.resolve_name(name, self.package) if node.level else name
        head = source.partition(".")[0]
        if head == "memwrap_kernels":
            return [_kernel(f"{source}.{a.name}", a.asname or a.name) for a in node.names]
        if head not in self.packages:
            self._allow(head)
            return None
        return [self._line(source, a.name, a.asname or a.name) for a in node.names]

    def _line(self, source: str, name: str, shown: str) -> str:
        if name == "*":
            self.needed.append(source)
            return f"from .{flat_name(source)} import *"
        inner = f"{source}.{name}"
        if _exists(inner):
            self.needed.append(inner)
            return f"from .{flat_name(inner)} import THIS_MODULE as {shown}"
        if source == "memwrap":  # a public name: from where it is defined
            source = getattr(getattr(memwrap, name, None), "__module__", "memwrap")
        if source == "memwrap":
            self._refuse(f"imports {name} from memwrap as a whole")
        self.needed.append(source)
        return f"from .{flat_name(source)} import {name} as {shown}"

    def of_import(self, node: ast.Import) -> list[str] | None:
        """Rewrite `import ...`; None leaves it as it is."""
        heads = {alias.name.partition(".")[0] for alias in node.names}
        if heads.isdisjoint({"memwrap_kernels", *self.packages}):
            for head in heads:
                self._allow(head)
            return None
        return [self._module_line(alias) for alias in node.names]

    def _module_line(self, alias: ast.alias) -> str:
        head, _, rest = alias.name.partition(".")
        if head == "memwrap_kernels":
            return _kernel(alias.name, alias.asname or alias.name)
        if head not in self.packages:
            self._allow(head)
            return f"import {alias.name}" + (f" as {alias.asname}" if alias.asname else "")
        if not rest or not alias.asname:
            self._refuse(f"has `import {alias.name}`; write `from ... import ...` instead")
        self.needed.append(alias.name)
        return f"from .{flat_name(alias.name)} import THIS_MODULE as {alias.asname}"

    def _allow(self, head: str) -> None:
        if head not in ALLOWED and head not in sys.stdlib_module_names:
            raise ValueError(
                f"The memory's code ({self.module}) needs the package {head}, so it cannot be "
                "exported to run with torch and transformers alone; save the model and load it "
                "with memwrap."
            )

    def _refuse(self, reason: str) -> None:
        raise ValueError(f"{self.module} cannot be exported: it {reason}.")


def _kernel(module: str, shown: str) -> str:
    return f'{shown} = __import__("importlib").import_module("{module}")'


def _origin(module: str) -> str | None:
    """Find the file that a module is loaded from; None for one that does not exist or has no
    file."""
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):  # below a plain module; `__main__`
        return None
    return spec.origin if spec is not None else None


def _exists(module: str) -> bool:
    return _origin(module) is not None


def _source(module: str) -> Path:
    """Find the file of a module.

    Raises:
        ValueError: if it has no Python source: it is compiled, or was typed into a notebook.
    """
    origin = None if module == "__main__" else _origin(module)
    if origin is None or not origin.endswith(".py") or not Path(origin).is_file():
        raise ValueError(
            f"{module} cannot be exported: it is no module with Python source ({origin}). Put the "
            "memory's code into a package of its own."
        )
    return Path(origin)
