"""Many requests by threads on one model in one process: no wrong answer, flat memory."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from small import ROOT

# MB that memory may grow by behind the first tenth: fragments of the allocator.
GROWTH = 8.0


@pytest.mark.parametrize(
    ("requests", "texts"),
    [pytest.param(50, 1, marks=pytest.mark.slow), pytest.param(2000, 8, marks=pytest.mark.full)],
)
def test_many_requests(requests: int, texts: int) -> None:
    """Measured over 2,000 requests: 0.3 MB."""
    script = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import many_requests; "
        f"print(json.dumps(many_requests.run({requests}, 4, {texts})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(ROOT / "benchmarks")], capture_output=True, text=True,
        check=False, timeout=1500, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == 0
    assert max(found["resident_mb"][1:]) - found["resident_mb"][0] < GROWTH
