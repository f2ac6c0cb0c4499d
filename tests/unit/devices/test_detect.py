"""Detection on machines built as folders: device nodes, installed packages, inherited variables."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hidream_grpc.devices.detect import (
    MAX_DEVICE_INDEX,
    Machine,
    detect,
    log_choice,
    parse_devices,
    select_devices,
)
from hidream_grpc.devices.device_types import CPU, CUDA, NPU, DeviceType
from hidream_grpc.errors import ConfigurationError, DeviceUnavailableError

MakeMachine = Callable[..., Machine]


@pytest.fixture
def make_machine(tmp_path: Path) -> MakeMachine:
    def make(
        nodes: tuple[str, ...] = (),
        *,
        torch_cuda_version: str | None = "13.0",
        has_torch_npu: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> Machine:
        dev_directory = tmp_path / "dev"
        dev_directory.mkdir()
        for name in ("null", "nvidiactl", "nvidia-uvm", "davinci_manager", *nodes):
            (dev_directory / name).touch()
        packages = tmp_path / "packages"
        (packages / "torch").mkdir(parents=True)
        (packages / "torch" / "__init__.py").write_text("raise ImportError('detection imported torch')")
        (packages / "torch" / "version.py").write_text(f"cuda = {torch_cuda_version!r}")
        if has_torch_npu:
            (packages / "torch_npu").mkdir()
            (packages / "torch_npu" / "__init__.py").write_text("raise ImportError('it needs CANN')")
        return Machine(dev_directory, environment or {}, [str(packages)])

    return make


NVIDIA = ("nvidia0", "nvidia1", "nvidia2", "nvidia3")
DAVINCI = ("davinci0", "davinci1", "davinci2", "davinci3")


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        pytest.param((), CPU, id="no device"),
        pytest.param(NVIDIA, CUDA, id="GPUs"),
        pytest.param(DAVINCI, NPU, id="NPUs"),
        pytest.param(NVIDIA + DAVINCI, NPU, id="both"),
    ],
)
def test_auto_takes_npu_before_cuda_before_cpu(
    make_machine: MakeMachine, nodes: tuple[str, ...], expected: DeviceType
) -> None:
    assert detect(machine=make_machine(nodes)) is expected


def test_auto_passes_over_devices_that_torch_cannot_use_and_says_why(
    make_machine: MakeMachine, caplog: pytest.LogCaptureFixture
) -> None:
    machine = make_machine(NVIDIA + DAVINCI, torch_cuda_version=None, has_torch_npu=False)
    assert detect(machine=machine) is CPU
    log_choice(CPU, is_cpu_enough=True, machine=machine)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "--device-type auto takes cpu; no npu: the Python package torch_npu is not installed "
        "(install the extra 'npu'); no cuda: the installed torch is not built for CUDA"
    )


@pytest.mark.parametrize(
    ("nodes", "is_cpu_enough", "level", "line"),
    [
        pytest.param(DAVINCI, False, logging.INFO, "npu", id="NPUs"),
        pytest.param(
            NVIDIA, False, logging.INFO, "cuda; no npu: this machine has none (no {dev}/davinciN)", id="GPUs"
        ),
        pytest.param((), True, logging.INFO, None, id="none, for the demo model"),
        pytest.param((), False, logging.WARNING, None, id="none, for a real model"),
    ],
)
def test_the_log_says_what_auto_chose_and_why(
    make_machine: MakeMachine,
    nodes: tuple[str, ...],
    is_cpu_enough: bool,
    level: int,
    line: str | None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine = make_machine(nodes)
    with caplog.at_level(logging.INFO):
        log_choice(detect(machine=machine), is_cpu_enough, machine)
    (record,) = caplog.records
    why_cpu = (
        "cpu; no npu: this machine has none (no {dev}/davinciN); "
        "no cuda: this machine has none (no {dev}/nvidiaN)"
    )
    expected = (line or why_cpu).format(dev=machine.dev_directory)
    assert (record.levelno, record.getMessage()) == (level, f"--device-type auto takes {expected}")


@pytest.mark.parametrize("variable_value", ["", " ", "-1"], ids=["empty", "blank", "none"])
def test_auto_says_when_a_variable_hides_all_devices(
    make_machine: MakeMachine, variable_value: str, caplog: pytest.LogCaptureFixture
) -> None:
    machine = make_machine(DAVINCI, environment={"ASCEND_RT_VISIBLE_DEVICES": variable_value})
    assert detect(machine=machine) is CPU
    log_choice(CPU, is_cpu_enough=True, machine=machine)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert (
        f"; no npu: ASCEND_RT_VISIBLE_DEVICES={variable_value} leaves none of "
        f"{machine.dev_directory}/davinciN visible; "
    ) in record.getMessage()


def test_a_type_that_is_there_can_be_asked_for_by_name(make_machine: MakeMachine) -> None:
    machine = make_machine(NVIDIA + DAVINCI)
    assert [detect(name, machine=machine) for name in ("npu", "cuda", "cpu")] == [NPU, CUDA, CPU]


@pytest.mark.parametrize(
    ("asked", "nodes", "options", "line"),
    [
        pytest.param(
            "cuda",
            (),
            {},
            "--device-type: cuda asked for, but this machine has none (no {dev}/nvidiaN)",
            id="no GPU",
        ),
        pytest.param(
            "npu",
            NVIDIA,
            {},
            "--device-type: npu asked for, but this machine has none (no {dev}/davinciN)",
            id="no NPU",
        ),
        pytest.param(
            "cuda",
            NVIDIA,
            {"environment": {"CUDA_VISIBLE_DEVICES": ""}},
            "--device-type: cuda asked for, but CUDA_VISIBLE_DEVICES= leaves none of {dev}/nvidiaN visible",
            id="all hidden",
        ),
        pytest.param(
            "npu",
            DAVINCI,
            {"has_torch_npu": False},
            "--device-type: npu asked for, but the Python package torch_npu is not installed "
            "(install the extra 'npu')",
            id="no torch_npu",
        ),
        pytest.param(
            "cuda",
            NVIDIA,
            {"torch_cuda_version": None},
            "--device-type: cuda asked for, but the installed torch is not built for CUDA",
            id="torch for CPUs",
        ),
    ],
)
def test_an_absent_type_is_one_line_that_names_the_flag_and_what_is_missing(
    make_machine: MakeMachine, asked: str, nodes: tuple[str, ...], options: dict[str, object], line: str
) -> None:
    machine = make_machine(nodes, **options)
    with pytest.raises(DeviceUnavailableError) as raised:
        detect(asked, machine=machine)
    assert str(raised.value) == line.format(dev=machine.dev_directory)


def test_an_unknown_type_is_told_the_ones_there_are() -> None:
    with pytest.raises(
        ConfigurationError, match=r"^--device-type: unknown device type 'tpu': auto, npu, cuda, cpu$"
    ):
        detect("tpu")


@pytest.mark.parametrize(
    ("variable_value", "expected"),
    [
        pytest.param("2,3", ("2", "3"), id="some"),
        pytest.param("3,1", ("3", "1"), id="reordered"),
        pytest.param(" 1 , 2 ", ("1", "2"), id="spaces"),
        pytest.param("", (), id="empty"),
        pytest.param("-1", (), id="none, as people write it"),
        pytest.param("0,9,1", ("0",), id="up to one that does not exist"),
        pytest.param("0,0,1", ("0",), id="up to a repetition"),
        pytest.param("GPU-8f2a,GPU-11c0", ("GPU-8f2a", "GPU-11c0"), id="unique ids"),
        pytest.param("MIG-5ab1", ("MIG-5ab1",), id="a slice of a GPU"),
    ],
)
def test_an_inherited_visible_devices_variable_is_honoured(
    make_machine: MakeMachine, variable_value: str, expected: tuple[str, ...]
) -> None:
    machine = make_machine(NVIDIA, environment={"CUDA_VISIBLE_DEVICES": variable_value})
    assert machine.visible_devices(CUDA) == expected


def test_a_variable_without_devices_makes_none(make_machine: MakeMachine) -> None:
    machine = make_machine(environment={"CUDA_VISIBLE_DEVICES": "GPU-8f2a"})
    assert detect(machine=machine) is CPU


def test_a_cpu_gives_as_many_ranks_as_asked(make_machine: MakeMachine) -> None:
    selection = select_devices(CPU, (0, 1, 2, 700), machine=make_machine())
    assert selection.num_ranks == 4
    assert [selection.local_index(rank) for rank in range(4)] == [0, 1, 2, 700]


def test_a_device_that_does_not_exist_is_one_line_with_the_flag_and_those_that_do(
    make_machine: MakeMachine,
) -> None:
    with pytest.raises(DeviceUnavailableError) as raised:
        select_devices(NPU, (0, 4, 5), flag="-d", machine=make_machine(DAVINCI))
    assert str(raised.value) == "-d: no npu device 4, 5 here; there are: 0, 1, 2, 3"


def test_ranks_see_only_their_group_s_devices(make_machine: MakeMachine) -> None:
    selection = select_devices(CUDA, (1, 3), machine=make_machine(NVIDIA))
    assert selection.environment({})["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert [selection.local_index(rank) for rank in range(2)] == [0, 1]


def test_devices_without_a_rank_are_told_and_no_rank_sees_them(make_machine: MakeMachine) -> None:
    selection = select_devices(CUDA, (3, 0, 2), machine=make_machine(NVIDIA)).only((3, 0))
    assert (selection.devices, selection.idle_devices) == ((3, 0), (2,))
    assert selection.num_ranks == 2
    assert selection.environment({})["CUDA_VISIBLE_DEVICES"] == "0,3"
    assert [selection.local_index(rank) for rank in range(2)] == [1, 0]


def test_device_numbers_count_among_the_devices_that_the_server_was_given(make_machine: MakeMachine) -> None:
    inherited = {"CUDA_VISIBLE_DEVICES": "GPU-8f2a,GPU-11c0,GPU-e902"}
    selection = select_devices(CUDA, (2, 0), machine=make_machine(NVIDIA, environment=inherited))
    assert selection.environment(inherited)["CUDA_VISIBLE_DEVICES"] == "GPU-e902,GPU-8f2a"
    assert [selection.local_index(rank) for rank in range(2)] == [0, 1]


def test_npu_indices_reach_the_runtime_in_ascending_order_and_each_rank_keeps_its_device(
    make_machine: MakeMachine,
) -> None:
    selection = select_devices(NPU, (3, 0, 2), machine=make_machine(DAVINCI))
    variables = selection.environment({})
    assert variables["ASCEND_RT_VISIBLE_DEVICES"] == "0,2,3"
    assert variables["DEVICE_COUNT"] == variables["HCCL_LOCAL_RANK_NUM"] == "3"
    assert [selection.local_index(rank) for rank in range(3)] == [2, 0, 1]


def test_what_the_operator_set_is_kept(make_machine: MakeMachine) -> None:
    inherited = {"HCCL_BUFFSIZE": "512", "TOKENIZERS_PARALLELISM": ""}
    variables = select_devices(NPU, (0,), machine=make_machine(DAVINCI)).environment(inherited)
    assert inherited.keys().isdisjoint(variables)
    assert variables["HCCL_TIMEOUT"] == "7200"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param("0", (0,), id="one"),
        pytest.param("0,1,2,3", (0, 1, 2, 3), id="list"),
        pytest.param("0-3", (0, 1, 2, 3), id="range"),
        pytest.param("6,0-2", (6, 0, 1, 2), id="order is kept"),
        pytest.param(" 0 , 1", (0, 1), id="spaces"),
        pytest.param("5-5", (5,), id="range of one"),
    ],
)
def test_device_lists_that_work(value: str, expected: tuple[int, ...]) -> None:
    assert parse_devices(value) == expected


@pytest.mark.parametrize(
    ("value", "line"),
    [
        pytest.param("0,1,0", "--devices: device 0 is named twice in '0,1,0'", id="twice"),
        pytest.param("0-3,2", "--devices: device 2 is named twice in '0-3,2'", id="twice by a range"),
        pytest.param(
            "-1",
            "--devices: '-1' in '-1' is no device: give indices from 0, such as 0,1,2,3 or 0-3",
            id="negative",
        ),
        pytest.param(
            "", "--devices: '' in '' is no device: give indices from 0, such as 0,1,2,3 or 0-3", id="empty"
        ),
        pytest.param(
            "0,,1",
            "--devices: '' in '0,,1' is no device: give indices from 0, such as 0,1,2,3 or 0-3",
            id="gap",
        ),
        pytest.param(
            "gpu0",
            "--devices: 'gpu0' in 'gpu0' is no device: give indices from 0, such as 0,1,2,3 or 0-3",
            id="words",
        ),
        pytest.param(
            "٣",
            "--devices: '٣' in '٣' is no device: give indices from 0, such as 0,1,2,3 or 0-3",
            id="other digits",
        ),
        pytest.param("3-1", "--devices: the range '3-1' in '3-1' ends before it starts", id="backwards"),
        pytest.param("0-9999", "--devices: 9999 in '0-9999' is above the highest index 1023", id="too many"),
    ],
)
def test_a_bad_device_list_is_one_line_with_the_flag_and_the_part(value: str, line: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        parse_devices(value)
    assert str(raised.value) == line


@given(st.lists(st.integers(0, MAX_DEVICE_INDEX), min_size=1, max_size=16, unique=True))
def test_every_list_of_different_indices_is_read_as_written(devices: list[int]) -> None:
    assert parse_devices(",".join(map(str, devices))) == tuple(devices)


@given(st.text(max_size=20))
def test_no_text_ends_in_anything_but_a_list_or_the_one_line(text: str) -> None:
    try:
        devices = parse_devices(text)
    except ConfigurationError as error:
        assert str(error).startswith("--devices: ")
    else:
        assert devices and len(set(devices)) == len(devices) and min(devices) >= 0
