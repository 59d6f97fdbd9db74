"""The plan of a call: where segments are cut."""

from __future__ import annotations

import pytest

from memwrap.engine.plan import segment_lengths


@pytest.mark.parametrize("total", [1, 7, 8, 9, 30, 32, 33])
def test_segment_lengths(total: int) -> None:
    for alignment in ("left", "right", "center"):
        lengths = segment_lengths(total, 8, alignment)
        assert sum(lengths) == total and min(lengths) > 0 and max(lengths) <= 8
        assert len(lengths) == -(-total // 8) or alignment == "center"
    assert segment_lengths(total, 8, "right") == segment_lengths(total, 8, "left")[::-1]
    with pytest.raises(ValueError, match="middle"):
        segment_lengths(total, 8, "middle")
