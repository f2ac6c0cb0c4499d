"""The table of docs/numerics.md: how far each layout is from one device, measured.

python -m tests.numerics.parity_table
"""

from __future__ import annotations

import sys
import tempfile
from functools import cache
from pathlib import Path

from tests.numerics.rank_worlds import RankResult, RankWorlds, Run
from tests.numerics.test_layouts import (
    CASES,
    LAYOUTS_OF_EACH_KIND,
    OTHER_LAYOUTS,
    SHAPES,
    largest_error,
    relative_error,
)
from tests.support.checkpoints import write_reshaped, write_tiny_checkpoint

DTYPES = ("float64", "float32", "bfloat16")


def write_table(folder: Path, rank_worlds: RankWorlds) -> None:
    """Write one row for each layout to the standard output."""
    tiny = write_tiny_checkpoint(folder / "tiny")

    @cache
    def checkpoint(shape: str) -> Path:
        return write_reshaped(tiny, folder / shape.replace(", ", "_"), **SHAPES[shape])

    @cache
    def generate(shape: str, layout: str) -> list[list[RankResult]]:
        return rank_worlds.run(layout, checkpoint(shape), [Run(CASES, dtype) for dtype in DTYPES])

    columns = [f"{dtype} {what}" for dtype in DTYPES for what in ("forward", "latents")]
    sys.stdout.write(f"| checkpoint | layout | {' | '.join(columns)} |\n")
    sys.stdout.write("|---" * (2 + len(columns)) + "|\n")
    for shape, layout in LAYOUTS_OF_EACH_KIND + OTHER_LAYOUTS:
        cells = []
        for (alone,), ranks in zip(generate(shape, "tp=1"), generate(shape, layout), strict=True):
            cells.append(max(_largest_forward_error(result, alone) for result in ranks))
            cells.append(max(largest_error(result, alone) for result in ranks))
        row = " | ".join(f"{cell:.0e}" for cell in cells)
        sys.stdout.write(f"| {shape} | `{layout}` | {row} |\n")


def _largest_forward_error(result: RankResult, expected: RankResult) -> float:
    return max(
        relative_error(result.first_predictions[case.name], expected.first_predictions[case.name])
        for case in CASES
    )


def main() -> None:
    """Generate every case in every layout and dtype."""
    with tempfile.TemporaryDirectory() as folder:
        rank_worlds = RankWorlds(Path(folder))
        try:
            write_table(Path(folder), rank_worlds)
        finally:
            rank_worlds.close()


if __name__ == "__main__":
    main()
