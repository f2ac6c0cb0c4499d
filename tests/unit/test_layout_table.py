from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hidream_grpc.cli import EXIT_STARTUP_ERROR, app
from hidream_grpc.devices.device_types import CUDA, DeviceMemory
from hidream_grpc.errors import InsufficientMemoryError
from hidream_grpc.model.checkpoint.demo import DEMO_NAME, demo_checkpoint_path
from hidream_grpc.model.checkpoint.hidream_i1 import HIDREAM_I1
from hidream_grpc.model.checkpoint.sizes import ImageSize, SizeLimits
from hidream_grpc.model.costs.model import ModelCosts, Workload
from hidream_grpc.model.memory_requirements import MemoryRequirements
from hidream_grpc.model.parallel.planner import parse_layout
from hidream_grpc.model.weight_format import WeightFormat, WeightFormats
from scripts.bench import layouts


def planned(*flags: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["plan", "--json", *flags])
    assert result.exit_code == 0, result.output
    answer: dict[str, Any] = json.loads(result.stdout)
    return answer


def test_the_plan_of_the_released_model_needs_no_checkpoint_and_names_what_each_word_takes() -> None:
    answer = planned("--num-devices", "4", "--device-memory", "24")
    assert answer["model"] == "HiDream-I1"
    rows = {(row["layout"], row["weights"]): row for row in answer["rows"]}
    by_word = {
        word: {row["layout"] for row in rows.values() if word in row["chosen_by"]}
        for word in ("table", "auto", "throughput")
    }
    assert by_word["table"] == {"tp=4"}
    assert by_word["throughput"] == {"tp=2,cfg=2", "cfg=2,dp=2"}
    table = rows["tp=4", "bfloat16"]
    assert (table["step_flops"], table["step_bytes_sent"]) == (37_962_323_066_880, 6_425_336_832)
    for row in rows.values():
        parts = ("weights", "text_encoders", "step", "decode", "prompts", "runtime")
        assert row["total_bytes"] == sum(row[f"{part}_bytes"] for part in parts)
        assert row["has_room_for_largest_step"] <= row["fits"]
    assert not rows["cfg=2", "bfloat16"]["fits"]
    assert rows["cfg=2", "int8"]["fits"]


def test_the_plan_says_what_the_start_would_say() -> None:
    device, host = DeviceMemory(24 * 10**9, 24 * 10**9), DeviceMemory(64 * 10**9, 64 * 10**9)
    workload = Workload.new(
        ImageSize(1024, 1024), SizeLimits(16, 1024 * 1024), 8 * 1024 * 1024, CUDA, has_guidance=True
    )
    for row in planned("--num-devices", "2", "--device-memory", "24", "--host-memory", "64")["rows"]:
        weights = WeightFormat(row["weights"])
        costs = ModelCosts(HIDREAM_I1, CUDA, WeightFormats(transformer=weights, text_encoders=weights))
        layout = parse_layout(row["layout"])
        memory = dict.fromkeys(range(layout.world_size), device)
        try:
            MemoryRequirements(costs, workload).check(layout, memory, host)
        except InsufficientMemoryError:
            assert not row["fits"], row["layout"]
        else:
            assert row["fits"], row["layout"]


def test_a_checkpoint_is_planned_by_its_own_dimensions() -> None:
    flags = ("-m", str(demo_checkpoint_path()), "--device-type", "cpu", "--host-memory", "8")
    answer = planned(*flags, "--num-devices", "2")
    assert answer["model"] == DEMO_NAME
    assert all(row["fits"] for row in answer["rows"])
    assert {row["host_bytes"] for row in answer["rows"]} == {0}


def test_a_faster_link_makes_what_sends_much_worth_it() -> None:
    def time_of_table(*flags: str) -> float:
        rows = planned("--num-devices", "4", *flags)["rows"]
        return next(float(row["relative_step_seconds"]) for row in rows if "table" in row["chosen_by"])

    assert time_of_table("--gigabytes-per-second", "1e6") == pytest.approx(0.25, abs=0.001)
    assert time_of_table("--teraflops", "1e6") > 100


def test_longer_prompts_need_what_the_start_counts_for_them() -> None:
    def work_bytes(*flags: str) -> int:
        (row, *_) = planned(*flags)["rows"]
        return int(row["step_bytes"] + row["prompts_bytes"])

    limits = SizeLimits(16, 1024 * 1024)
    workload = Workload.new(
        *(ImageSize(1024, 1024), limits, 8 * 1024 * 1024, CUDA), has_guidance=True, max_prompt_tokens=256
    )
    work = ModelCosts(HIDREAM_I1, CUDA).work_bytes(parse_layout("tp=1"), workload.largest)
    assert work_bytes("--max-prompt-tokens", "256") == work.step_bytes + work.prompts_bytes > work_bytes()


def test_the_table_is_a_line_a_layout_under_its_headings() -> None:
    result = CliRunner().invoke(app, ["plan", "--device-memory", "48"])
    headings, *lines = result.stdout.splitlines()
    assert headings.split()[:3] == ["layout", "devices", "weights"]
    assert [line.split()[:3] for line in lines] == [["tp=1", "1", word] for word in WeightFormat]
    assert all(line.endswith("table auto throughput") for line in lines)


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["plan", "-m", str(tmp_path)])
    assert result.exit_code == EXIT_STARTUP_ERROR
    assert result.stderr.startswith("hidream-grpc: -m/--model-path: ")
    assert result.stderr.count("\n") == 1


def test_the_table_of_the_documents_is_what_is_counted() -> None:
    rows = {num_devices: layouts.rows_of(num_devices) for num_devices in (1, 2, 4, 8)}
    assert layouts.table(rows) in Path("docs/performance.md").read_text(encoding="utf-8")
