"""Print pip constraints that pin every dependency of pyproject.toml to its lower bound.

python .ci/lower_bounds.py [NAME TO LEAVE OUT]... > constraints.txt
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"
BOUND = re.compile(r"([\w.-]+)(?:\[[\w,]+\])?>=([\d.]+)")


def lower_bounds(path: Path = PYPROJECT) -> dict[str, str]:
    """Read the lower bound of every package that memwrap or one of its extras names.

    Raises:
        ValueError: for a dependency without a lower bound, or with two.
    """
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    found: dict[str, str] = {}
    for line in [line for lines in lists for line in lines]:
        if line.startswith(f"{project['name']}["):
            continue  # extras of its own
        bound = BOUND.match(line)
        if bound is None:
            raise ValueError(f"{path.name}: {line!r} has no lower bound; write NAME>=VERSION.")
        name, version = bound[1].lower().replace("_", "-"), bound[2]
        if found.setdefault(name, version) != version:
            raise ValueError(f"{path.name}: {name} has two lower bounds; write the same twice.")
    return found


if __name__ == "__main__":
    for name, version in sorted(lower_bounds().items()):
        if name not in sys.argv[1:]:
            print(f"{name}=={version}")
