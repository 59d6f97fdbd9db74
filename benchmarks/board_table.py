"""Put the leaderboard of `memwrap bench memories --model smollm2` into docs/comparison.md, and the
cells that a choice hangs on into docs/choosing.md.

memwrap bench memories --model smollm2 -o benchmarks/results/leaderboard
python benchmarks/board_table.py
"""

from __future__ import annotations

from pages import DOCS, HERE, put

from memwrap.comparison.board import NOTHING, TRUNCATED, WHOLE, read_cells
from memwrap.comparison.board_page import board_page, free_table, plot_board

COMMAND = "memwrap bench memories --model smollm2"
PICTURE = "leaderboard.png"
LINK = "[{1}](methods/{0}.md)"
CHOICES = (WHOLE, NOTHING, TRUNCATED, "window", "compact", "infllm")
MORE = """
## Trained, with one budget

All memories trained for minutes on the shipped toy of 6 million parameters, beside what their
papers claim: [comparison on the tiny LM](comparison_tiny.md). What follows for a choice:
[choosing](choosing.md).
"""


def main() -> None:
    folder = HERE / "results" / "leaderboard"
    page = board_page(folder, COMMAND, PICTURE, link=LINK)
    (DOCS / "comparison.md").write_text(page + MORE)
    cells = read_cells(folder)
    plot_board(cells, DOCS / "figures" / PICTURE)
    chosen = [cell for cell in cells if cell["name"] in CHOICES]
    put("choosing.md", "board", free_table(chosen, LINK))


if __name__ == "__main__":
    main()
