"""Put the leaderboard of `memwrap bench memories --model smollm2` into docs/comparison.md.

memwrap bench memories --model smollm2 -o benchmarks/results/leaderboard
python benchmarks/board_table.py
"""

from __future__ import annotations

from pages import DOCS, HERE

from memwrap.comparison.board import read_cells
from memwrap.comparison.board_page import board_page, plot_board

COMMAND = "memwrap bench memories --model smollm2"
PICTURE = "leaderboard.png"
MORE = """
## Trained, with one budget

All memories trained for minutes on the shipped toy of 6 million parameters, beside what their
papers claim: [comparison on the tiny LM](comparison_tiny.md). What follows for a choice:
[choosing](choosing.md).
"""


def main() -> None:
    folder = HERE / "results" / "leaderboard"
    page = board_page(folder, COMMAND, PICTURE, link="[{1}](methods/{0}.md)")
    (DOCS / "comparison.md").write_text(page + MORE)
    plot_board(read_cells(folder), DOCS / "figures" / PICTURE)


if __name__ == "__main__":
    main()
