"""Figure 6 of the design: what each rank of a layout computes, holds and sends ÷ one device.

The transformer has the real model's dimensions, and a step is one image of 1024×1024 with guidance. For 1,
2, 4 and 8 devices these are the layouts that no other one beats in time, throughput, devices and memory at
once, and the table's, each in every format of weights, as `hidream-grpc plan` counts them;
`tests/numerics/test_layout_costs.py` holds the counts against real ranks. Prints one JSON line, or the table
of docs/performance.md.

    python -m scripts.bench.layouts [--devices 1,2,4,8] [--markdown]
"""

from __future__ import annotations

from typing import Annotated

import typer

from hidream_grpc.devices.device_types import CUDA, DeviceMemory
from hidream_grpc.layout_table import LayoutRow, PlannedDevices, PlannedModel, layout_rows
from hidream_grpc.model.weight_format import WeightFormat
from hidream_grpc.settings import Settings
from scripts.bench.report import Value, report

_UNLIMITED = DeviceMemory(2**62, 2**62)
# Both formats of one byte hold as much.
_FORMATS = (WeightFormat.BFLOAT16, WeightFormat.INT8)


def main(
    devices: Annotated[str, typer.Option(help="numbers of devices, with commas between")] = "1,2,4,8",
    markdown: Annotated[bool, typer.Option("--markdown", help="the table of docs/performance.md")] = False,
) -> None:
    """Count every layout, print those that are worth it."""
    rows = {int(part): rows_of(int(part)) for part in devices.split(",")}
    if markdown:
        print(table(rows))
        return
    layouts: list[dict[str, Value]] = [
        {
            "num_devices": num_devices,
            "layout": row.layout,
            "weights": row.weights,
            "weights_gigabytes": round(row.weights_bytes / 1e9, 3),
            "step_tflop": round(row.step_flops / 1e12, 3),
            "step_gigabytes_sent": round(row.step_bytes_sent / 1e9, 3),
            "step_seconds_ratio": row.relative_step_seconds,
            "images_per_second_ratio": row.relative_images_per_second,
        }
        for num_devices, of_number in rows.items()
        for row in of_number
    ]
    report("layouts", layouts=layouts, width=1024, height=1024, num_samples=2)


def rows_of(num_devices: int) -> list[LayoutRow]:
    """The layouts of exactly so many devices, whatever their memory."""
    planned = PlannedDevices(
        device_type=CUDA,
        num_devices=num_devices,
        device_memory=_UNLIMITED,
        host_memory=_UNLIMITED,
        speed=CUDA.speed,
        max_step_pixels=Settings.model_fields["max_step_pixels"].default,
    )
    rows = layout_rows(PlannedModel.released(), planned, _FORMATS)
    return [row for row in rows if row.num_devices == num_devices]


def table(rows: dict[int, list[LayoutRow]]) -> str:
    """The table in Markdown: a line for each layout, with both formats of its weights."""
    lines = [
        "| devices | layout | weights held, bfloat16 | int8, float8 | step | sent in a step | time of a step "
        "| images a second | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for num_devices, of_number in rows.items():
        held = {(row.layout, row.weights): row.weights_bytes for row in of_number}
        for row in of_number:
            if row.weights is not WeightFormat.BFLOAT16:
                continue
            sizes = (held[row.layout, weights] / 1e9 for weights in _FORMATS)
            lines.append(
                f"| {num_devices} | `{row.layout}` | {' | '.join(f'{size:.2f} GB' for size in sizes)} "
                f"| {row.step_flops / 1e12:.1f} TFLOP | {row.step_bytes_sent / 1e9:.2f} GB "
                f"| {row.relative_step_seconds:.2f} | {row.relative_images_per_second:.2f} "
                f"| {', '.join(row.chosen_by)} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    typer.run(main)
