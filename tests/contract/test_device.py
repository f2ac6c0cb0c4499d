"""What every device offers a rank; run on each device type that this machine has."""

from __future__ import annotations

import pytest
import torch

from hidream_grpc.devices.detect import detect
from hidream_grpc.devices.device import Device, open_device
from hidream_grpc.devices.device_types import DEVICE_TYPES, DeviceType
from hidream_grpc.errors import DeviceUnavailableError


def is_present(name: str) -> bool:
    try:
        detect(name)
    except DeviceUnavailableError:
        return False
    return True


@pytest.fixture(params=[name for name in DEVICE_TYPES if is_present(name)])
def device_type(request: pytest.FixtureRequest) -> DeviceType:
    return DEVICE_TYPES[request.param]


@pytest.fixture
def device(device_type: DeviceType) -> Device:
    return open_device(device_type.name, 0)


def test_the_rank_meets_the_backend_that_the_server_planned_with(
    device: Device, device_type: DeviceType
) -> None:
    assert device.backend == device_type.backend
    assert device.torch_device.type == device_type.name
    assert torch.distributed.is_backend_available(device.backend)
    assert device.dtype.itemsize == device_type.bytes_per_weight


def test_the_device_has_a_name_to_show(device: Device) -> None:
    assert device.name.strip()


def test_memory_is_in_bytes_and_free_is_a_part_of_the_total(device: Device) -> None:
    memory = device.memory()
    assert 2**28 < memory.total_bytes < 2**50
    assert 0 < memory.free_bytes <= memory.total_bytes


def free_memory_falls_while_a_tensor_is_held(device: Device) -> bool:
    before_bytes = device.memory().free_bytes
    # Far more than the machine's other processes take and give back meanwhile.
    tensor_bytes = min(2**29, before_bytes // 4)
    held = torch.ones(tensor_bytes, dtype=torch.uint8, device=device.torch_device)
    device.synchronize()
    during_bytes = device.memory().free_bytes
    del held
    device.empty_cache()
    return before_bytes - during_bytes > tensor_bytes // 2


def test_memory_that_a_tensor_takes_is_no_longer_free(device: Device) -> None:
    # Other processes of the machine give memory back too: not in five moments on end.
    assert any(free_memory_falls_while_a_tensor_is_held(device) for _ in range(5))


def test_arithmetic_in_the_device_s_dtype_is_finished_after_synchronize(device: Device) -> None:
    left = torch.full((64, 64), 0.5, dtype=device.dtype, device=device.torch_device)
    product = left @ left
    device.synchronize()
    assert torch.equal(product.float().cpu(), torch.full((64, 64), 16.0))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "float8"])
def test_products_of_quantized_matrices_are_those_of_the_numbers_that_they_stand_for(
    dtype: torch.dtype, device: Device, device_type: DeviceType
) -> None:
    if dtype is torch.float8_e4m3fn and not device_type.has_float8:
        pytest.skip("the server refuses it")
    # Small integers, so that every dtype gives the same.
    units = torch.randint(-8, 9, (3, 32, 64), generator=torch.Generator().manual_seed(0)).float()
    scales = torch.tensor([0.5, 1.0, 2.0, 4.0]).repeat(3, 8)
    rows = torch.arange(24.0)[:, None] % 5 - 2.0 + torch.zeros(24, 64)
    ends = torch.tensor([7, 7, 24], dtype=torch.int32, device=device.torch_device)
    inputs, of_device = (x.to(device.torch_device, device.dtype) for x in (rows, scales))
    quantized = units.to(dtype).to(device.torch_device)
    exact = units * scales[..., None]

    product = device.quantized_linear(inputs, quantized[0], of_device[0], of_device[1])
    assert torch.equal(product.float().cpu(), rows @ exact[0].T + scales[1])
    grouped = device.quantized_grouped_linear(inputs, quantized, of_device, ends)
    expected = torch.cat((rows[:7] @ exact[0].T, rows[7:] @ exact[2].T))
    torch.testing.assert_close(grouped.float().cpu(), expected, rtol=1e-2, atol=0.0)


def test_a_tensor_that_cannot_fit_is_recognised_as_out_of_memory_and_the_device_goes_on(
    device: Device,
) -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50, dtype=torch.uint8, device=device.torch_device)
    assert device.is_out_of_memory(raised.value)
    device.empty_cache()
    assert torch.ones(4, device=device.torch_device).sum().item() == 4


def test_other_errors_are_not_taken_for_out_of_memory(device: Device) -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.ones(2, 3, device=device.torch_device) @ torch.ones(2, 3, device=device.torch_device)
    assert not device.is_out_of_memory(raised.value)
    assert not device.is_out_of_memory(ValueError("DefaultCPUAllocator: can't allocate memory"))
