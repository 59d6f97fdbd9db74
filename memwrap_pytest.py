"""Lets `pytest --pyargs memwrap.testing` know the options of the invariants.

pytest looks for the options of a conftest.py where paths on the command line lead, and a package's
name is no path. This module is an entry point, so pytest imports it wherever memwrap is installed:
it imports nothing but pytest, and does nothing unless the package is named.
"""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Add the package's folder to the places where pytest looks for a first conftest.py."""
    named = early_config.known_args_namespace.file_or_dir
    if any(re.match(r"memwrap\.testing\b", name) for name in named):
        found = find_spec("memwrap.testing")
        named.extend(found.submodule_search_locations or () if found else ())
