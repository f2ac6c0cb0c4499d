"""A rank that cannot load says why in one line, and whether its device is the cause."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from hidream_grpc.devices.cpu import CpuDevice
from hidream_grpc.engine.protocol.channel import BlockingChannel
from hidream_grpc.engine.protocol.collective_counter import CollectiveCounterReader
from hidream_grpc.engine.protocol.messages import Command, DeviceOpened, Load, LoadFailed, LoadWeights
from hidream_grpc.engine.rank import worker
from hidream_grpc.log_streams import drain_streams
from hidream_grpc.logs import LogConfig
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from hidream_grpc.model.checkpoint.description import describe_checkpoint
from hidream_grpc.model.checkpoint.fingerprint import fingerprint_of
from hidream_grpc.model.checkpoint.step_shapes import StepShape
from hidream_grpc.model.image_metadata import ImageMetadata
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.pipeline import HiDreamModel
from hidream_grpc.model.weight_format import WeightFormats
from tests.support.torch_threads import one_thread

__all__ = ["one_thread"]


class Channel:
    """A connection to a server that lets the rank load its weights, and then has it leave."""

    def __init__(self) -> None:
        self.sent: list[object] = []

    def send(self, event: object) -> None:
        self.sent.append(event)

    def receive(self) -> Command:
        return LoadWeights()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the demo checkpoint to break."""
    return Path(shutil.copytree(demo_checkpoint_path(), tmp_path / "own"))


@pytest.fixture(autouse=True)
def own_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def failure_of(model_path: Path, folder: Path, compile_shapes: tuple[StepShape, ...] = ()) -> LoadFailed:
    """The message of a rank that cannot load, whose log is written to a file in the folder."""
    channel = Channel()
    load = Load(
        model_path=model_path,
        extra_model_path=None,
        checkpoint_fingerprint=fingerprint_of(model_path, None),
        weights=WeightFormats(),
        layout=Layout(),
        device_type="cpu",
        local_index=0,
        num_threads=1,
        compile_shapes=compile_shapes,
        image_metadata=ImageMetadata(),
        counter_path=CollectiveCounterReader(folder).path,
        log=LogConfig(file=folder / "log"),
    )
    with pytest.raises(SystemExit):
        worker._load_and_serve(cast(BlockingChannel[Command], channel), 0, load)
    failed = channel.sent.pop()
    assert all(isinstance(event, DeviceOpened) for event in channel.sent)
    assert isinstance(failed, LoadFailed)
    assert "\n" not in failed.reason
    return failed


@pytest.mark.parametrize(
    ("component", "changes", "reason"),
    [
        ("text_encoder", {"hidden_act": "nonsense"}, "cannot be loaded: KeyError: "),
        ("text_encoder_3", {"feed_forward_proj": "gated-a-b"}, "cannot be loaded: "),
        ("text_encoder_4", {"rope_parameters": {"rope_type": "nonsense"}}, "cannot be loaded: KeyError: "),
        ("scheduler", {"solver_type": "nonsense"}, "cannot be loaded: NotImplementedError: nonsense is not "),
        ("scheduler", {"final_sigmas_type": "nonsense"}, "cannot be loaded: ValueError: `final_sigmas_type`"),
    ],
)
def test_a_configuration_that_no_check_knows_is_told_with_its_folder(
    component: str,
    changes: dict[str, Any],
    reason: str,
    checkpoint: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = checkpoint / component
    edit(next(folder.glob("*config.json")), **changes)
    describe_checkpoint(checkpoint, None)
    failed = failure_of(checkpoint, tmp_path)
    assert failed.reason.startswith(f"-m/--model-path: {folder}: {reason}")
    assert not failed.is_device
    assert not failed.is_out_of_memory
    assert "Traceback" not in capfd.readouterr().err
    drain_streams()
    assert "Traceback" in (tmp_path / "log").read_text()


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_arguments: object, **_named: object) -> None:
        raise error

    return fail


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


TWO_LINES = RuntimeError("Error(s) in loading:\n\tsize mismatch for x")


@pytest.mark.parametrize(
    ("error", "is_device", "is_out_of_memory"),
    [
        (TWO_LINES, False, False),
        (torch.AcceleratorError("CUDA error: an illegal memory access"), True, False),
        (MemoryError("no room"), True, True),
        (caused_by(RuntimeError("wrapped"), MemoryError("no room")), True, True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True, True),
    ],
    ids=["of the model", "of the device", "no room", "no room, wrapped", "no room for torch"],
)
@pytest.mark.parametrize("where", ["vae", "between the parts"])
def test_an_error_while_loading_is_the_devices_only_where_it_says_so(
    error: Exception,
    is_device: bool,
    is_out_of_memory: bool,
    where: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if where == "vae":
        monkeypatch.setattr("hidream_grpc.model.pipeline.load_vae", raising(error))
    else:
        monkeypatch.setattr(HiDreamModel, "from_pretrained", raising(error))
    failed = failure_of(demo_checkpoint_path(), tmp_path)
    assert (failed.is_device, failed.is_out_of_memory) == (is_device, is_out_of_memory)
    if is_device:
        assert failed.reason.startswith("rank 0 cannot load: ")
    else:
        assert failed.reason.startswith(f"-m/--model-path: {demo_checkpoint_path()}")
        assert failed.reason.endswith(
            ": cannot be loaded: RuntimeError: Error(s) in loading: size mismatch for x"
        )


def test_a_device_that_refuses_all_that_comes_after_an_error_is_to_blame(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hidream_grpc.model.pipeline.load_vae", raising(RuntimeError("ERR00100")))
    monkeypatch.setattr(CpuDevice, "synchronize", raising(RuntimeError("the device is lost")))
    assert failure_of(demo_checkpoint_path(), tmp_path) == LoadFailed(
        reason="rank 0 cannot load: RuntimeError: ERR00100", is_device=True
    )


def test_a_device_that_cannot_be_opened_is_to_blame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "open_device", raising(RuntimeError("fallen off the bus")))
    assert failure_of(demo_checkpoint_path(), tmp_path) == LoadFailed(
        reason="rank 0 cannot load: RuntimeError: fallen off the bus", is_device=True
    )


def test_a_compiler_that_fails_is_told_with_its_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HiDreamModel, "compile", raising(RuntimeError("no C++ compiler")))
    failed = failure_of(demo_checkpoint_path(), tmp_path, (StepShape(64, 64, 1),))
    assert failed == LoadFailed(
        reason="--compile-shapes: the transformer cannot be compiled: RuntimeError: no C++ compiler"
    )
