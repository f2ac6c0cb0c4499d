"""Which devices this machine has, found without torch, and which of them the ranks get."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from hidream_grpc.devices.device_types import CPU, CUDA, DEVICE_TYPES, NPU, DeviceType
from hidream_grpc.errors import ConfigurationError, DeviceUnavailableError

_logger = logging.getLogger(__name__)

DEVICE_TYPE_FLAG = "--device-type"
DEVICES_FLAG = "--devices"

AUTO = "auto"

MAX_DEVICE_INDEX = 1023
"""Far above any machine; keeps a mistyped range from becoming a million ranks."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The parts of a machine from which its devices are known.

    Attributes:
        dev_directory: where the device nodes are.
        environment: of this process, with the visible-devices variables that it inherited.
        import_path: folders that hold Python packages; None is `sys.path`.
    """

    dev_directory: Path = Path("/dev")
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    import_path: Sequence[str] | None = None

    def num_devices(self, device_type: DeviceType) -> int:
        """How many devices of a counted type there are, visible or not."""
        node = re.compile(rf"{device_type.device_node_prefix}\d+")
        return sum(1 for path in self.dev_directory.glob("*") if node.fullmatch(path.name))

    def visible_devices(self, device_type: DeviceType) -> tuple[str, ...]:
        """The devices of a counted type that this process may use, as its runtime names them.

        Without an inherited visible-devices variable these are the indices of all device nodes.
        With one, its entries up to the first that the runtime would not accept: an index that does
        not exist, or anything but an index or a GPU's or GPU slice's unique id.
        """
        num_nodes = self.num_devices(device_type)
        inherited = self.environment.get(device_type.visible_devices_variable or "")
        if inherited is None or num_nodes == 0:
            return tuple(str(index) for index in range(num_nodes))
        visible: list[str] = []
        for entry in (entry.strip() for entry in inherited.split(",")):
            is_index = entry.isdecimal() and int(entry) < num_nodes
            if entry in visible or not (is_index or entry.startswith(("GPU-", "MIG-"))):
                break
            visible.append(entry)
        return tuple(visible)

    def missing_software(self, device_type: DeviceType) -> str | None:
        """What must be installed before torch can use devices of this type; None if nothing."""
        find_spec = importlib.machinery.PathFinder.find_spec
        if device_type is NPU and find_spec("torch_npu", self.import_path) is None:
            return "the Python package torch_npu is not installed (install the extra 'npu')"
        if device_type is CUDA:
            torch_spec = find_spec("torch", self.import_path)
            if torch_spec is None or not _is_built_for_cuda(torch_spec):
                return "the installed torch is not built for CUDA"
        return None


@dataclass(frozen=True, slots=True)
class DeviceSelection:
    """The devices of one rank group; each is on this machine.

    Attributes:
        device_type: one for all of them.
        devices: those of rank 0, 1, …, as asked: indices among the devices visible to the server.
        runtime_names: the same devices as the runtime names them; empty where it counts none.
        idle_devices: devices that were also asked for, and have no rank.
    """

    device_type: DeviceType
    devices: tuple[int, ...]
    runtime_names: tuple[str, ...]
    idle_devices: tuple[int, ...] = ()

    @property
    def num_ranks(self) -> int:
        """Number of ranks: one for each device."""
        return len(self.devices)

    def only(self, devices: tuple[int, ...]) -> DeviceSelection:
        """Some of these devices, one for each rank in this order; the others stay idle."""
        positions = [self.devices.index(device) for device in devices]
        return replace(
            self,
            devices=devices,
            runtime_names=tuple(self.runtime_names[p] for p in positions if self.runtime_names),
            idle_devices=tuple(d for d in self.devices if d not in devices) + self.idle_devices,
        )

    def local_index(self, rank: int) -> int:
        """The index that `open_device` takes in the process of this rank."""
        if not self.runtime_names:
            return self.devices[rank]
        return self._visible_names().index(self.runtime_names[rank])

    def environment(self, inherited: Mapping[str, str]) -> dict[str, str]:
        """Variables to set in the ranks, before torch is imported, on top of the inherited ones.

        Defaults give way to what the operator set; the visible-devices variable is narrowed to
        these devices, so that no rank takes memory on another one.
        """
        defaults = self.device_type.environment(self.num_ranks)
        variables = {name: value for name, value in defaults.items() if name not in inherited}
        if self.device_type.visible_devices_variable is not None:
            variables[self.device_type.visible_devices_variable] = ",".join(self._visible_names())
        return variables

    def _visible_names(self) -> list[str]:
        # CANN accepts ascending indices only; unique ids may stand in any order.
        return sorted(self.runtime_names, key=lambda name: int(name) if name.isdecimal() else -1)


def detect(device_type: str = AUTO, machine: Machine | None = None) -> DeviceType:
    """The device type to use: the one asked for, or the first that this machine has.

    Args:
        device_type: "auto", or the name of one.
        machine: where to look for devices; this machine by default.

    Raises:
        ConfigurationError: there is no such device type.
        DeviceUnavailableError: this machine has no such device, or lacks its software.
    """
    machine = machine or Machine()
    if device_type == AUTO:
        return next((each for each in (NPU, CUDA) if _why_not(each, machine) is None), CPU)
    if device_type not in DEVICE_TYPES:
        raise ConfigurationError(
            DEVICE_TYPE_FLAG, f"unknown device type {device_type!r}: auto, {', '.join(DEVICE_TYPES)}"
        )
    asked = DEVICE_TYPES[device_type]
    if asked is not CPU and (reason := _why_not(asked, machine)) is not None:
        raise DeviceUnavailableError(DEVICE_TYPE_FLAG, f"{asked.name} asked for, but {reason}")
    return asked


def log_choice(chosen: DeviceType, is_cpu_enough: bool, machine: Machine | None = None) -> None:
    """Log what `detect` chose by itself, and why nothing before it.

    It is a warning where devices are there and cannot be used, and where only a CPU was found for a model
    that takes hours on one.
    """
    machine = machine or Machine()
    accelerators = (NPU, CUDA)
    passed_over = accelerators[: accelerators.index(chosen)] if chosen in accelerators else accelerators
    reasons = "".join(f"; no {each.name}: {_why_not(each, machine)}" for each in passed_over)
    is_lack = (chosen is CPU and not is_cpu_enough) or any(map(machine.num_devices, passed_over))
    level = logging.WARNING if is_lack else logging.INFO
    _logger.log(level, "%s auto takes %s%s", DEVICE_TYPE_FLAG, chosen.name, reasons)


def all_devices(device_type: DeviceType, machine: Machine | None = None) -> tuple[int, ...]:
    """The indices of all devices of a counted type that this process may use."""
    return tuple(range(len((machine or Machine()).visible_devices(device_type))))


def select_devices(
    device_type: DeviceType,
    devices: tuple[int, ...],
    flag: str = DEVICES_FLAG,
    machine: Machine | None = None,
) -> DeviceSelection:
    """Check that the devices are on this machine.

    Args:
        device_type: of the devices, from `detect`.
        devices: one for each rank, from `parse_devices`; on a CPU any numbers, one a rank.
        flag: what the operator used to ask, for the error's text.
        machine: where to look for devices; this machine by default.

    Raises:
        DeviceUnavailableError: a device does not exist.
    """
    if device_type is CPU:
        return DeviceSelection(device_type, devices, ())
    visible = (machine or Machine()).visible_devices(device_type)
    absent = [str(device) for device in devices if device >= len(visible)]
    if absent:
        there = ", ".join(str(index) for index in range(len(visible))) or "none"
        raise DeviceUnavailableError(
            flag, f"no {device_type.name} device {', '.join(absent)} here; there are: {there}"
        )
    return DeviceSelection(device_type, devices, tuple(visible[device] for device in devices))


def parse_devices(value: str) -> tuple[int, ...]:
    """Read a device list such as "0,1,2,3", "0-3" or "0,4-7".

    Raises:
        ConfigurationError: not such a list, or a device is named twice.
    """
    devices: list[int] = []
    for part in (part.strip() for part in value.split(",")):
        match = re.fullmatch(r"([0-9]{1,4})(?:-([0-9]{1,4}))?", part)
        if match is None:
            raise ConfigurationError(
                DEVICES_FLAG,
                f"{part!r} in {value!r} is no device: give indices from 0, such as 0,1,2,3 or 0-3",
            )
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigurationError(DEVICES_FLAG, f"the range {part!r} in {value!r} ends before it starts")
        if last > MAX_DEVICE_INDEX:
            raise ConfigurationError(
                DEVICES_FLAG, f"{last} in {value!r} is above the highest index {MAX_DEVICE_INDEX}"
            )
        devices.extend(range(first, last + 1))
    for position, device in enumerate(devices):
        if device in devices[:position]:
            raise ConfigurationError(DEVICES_FLAG, f"device {device} is named twice in {value!r}")
    return tuple(devices)


def _why_not(device_type: DeviceType, machine: Machine) -> str | None:
    """Why no device of a counted type can be used; None where one can."""
    if not machine.visible_devices(device_type):
        return _what_is_missing(device_type, machine)
    return machine.missing_software(device_type)


def _what_is_missing(device_type: DeviceType, machine: Machine) -> str:
    variable = device_type.visible_devices_variable
    node = machine.dev_directory / f"{device_type.device_node_prefix}N"
    if variable is not None and variable in machine.environment:
        return f"{variable}={machine.environment[variable]} leaves none of {node} visible"
    return f"this machine has none (no {node})"


def _is_built_for_cuda(torch_spec: importlib.machinery.ModuleSpec) -> bool:
    # torch/version.py stands alone: running it does not import torch.
    for folder in torch_spec.submodule_search_locations or ():
        spec = importlib.util.spec_from_file_location("torch_version", Path(folder) / "version.py")
        if spec is not None and spec.loader is not None:
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return getattr(module, "cuda", None) is not None
    return False
