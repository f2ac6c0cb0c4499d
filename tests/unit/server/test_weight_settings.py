from __future__ import annotations

import pytest

from hidream_grpc.devices.device_types import CPU, CUDA, NPU, DeviceType
from hidream_grpc.errors import ConfigurationError
from hidream_grpc.model.weight_format import WeightFormat, WeightFormats
from hidream_grpc.server.configuration import weight_formats
from hidream_grpc.settings import load_settings


@pytest.mark.parametrize("device_type", [CPU, CUDA, NPU], ids=lambda device_type: device_type.name)
def test_weights_are_those_of_the_computation_unless_they_are_set(device_type: DeviceType) -> None:
    assert weight_formats(load_settings({}, None), device_type) == WeightFormats()
    settings = load_settings({"weights": "int8"}, None)
    assert weight_formats(settings, device_type) == WeightFormats(transformer=WeightFormat.INT8)


@pytest.mark.parametrize("field", ["weights", "text_encoder_weights"])
def test_a_format_that_the_devices_lack_is_refused_with_its_flag(field: str) -> None:
    settings = load_settings({field: "float8"}, None)
    assert weight_formats(settings, CUDA) != WeightFormats()
    with pytest.raises(ConfigurationError) as refused:
        weight_formats(settings, NPU)
    assert str(refused.value) == f"--{field.replace('_', '-')}: no float8 on npu; int8 takes as little memory"
