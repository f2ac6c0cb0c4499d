"""A rank that is started again when other files lie in the model folder does not join with other weights."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from safetensors.numpy import load_file, save_file

from hidream.v1 import job_pb2, server_info_pb2
from hidream_grpc.engine.group.config import GroupTimeouts
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.errors import RankDiedError
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from hidream_grpc.model.checkpoint.fingerprint import fingerprint_of
from hidream_grpc.model.parallel.layout import Layout
from tests.support.live_server import LiveServer, running_server, wait_until
from tests.support.rank_groups import draw, group_config, picture, zygote_pid_of
from tests.support.streams import Stream, follow, read_until, request

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def shared_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    return Path(shutil.copytree(demo_checkpoint_path(), folder))


@pytest.fixture
def checkpoint(shared_checkpoint: Path) -> Iterator[Path]:
    """A copy of the demo checkpoint whose files may be exchanged; they are put back after each test."""
    yield shared_checkpoint
    restore(shared_checkpoint)


def retrain(weights: Path) -> None:
    """Write other weights of the same shapes into the same file."""
    tensors = load_file(weights)
    other = weights.with_suffix(".other")
    save_file({name: tensor * 1.01 for name, tensor in tensors.items()}, other, {"format": "pt"})
    weights.write_bytes(other.read_bytes())


def restore(checkpoint: Path) -> None:
    shutil.copytree(demo_checkpoint_path(), checkpoint, dirs_exist_ok=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def group(shared_checkpoint: Path) -> AsyncIterator[RankGroup]:
    """Two ranks that load the copy, and may go on with one; each test leaves them whole."""
    group = RankGroup(
        group_config(
            2,
            model_path=shared_checkpoint,
            checkpoint_fingerprint=fingerprint_of(shared_checkpoint, None),
            smaller_layouts=(Layout(),),
            timeouts=GroupTimeouts(load_seconds=120.0, init_seconds=1.0),
        )
    )
    await group.start()
    yield group
    await group.stop()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        pytest.param(lambda folder: retrain(folder / WEIGHTS), "has changed", id="other weights"),
        pytest.param(
            lambda folder: os.truncate(folder / WEIGHTS, 1_000_000),
            "has changed",
            id="half a weight file",
            marks=pytest.mark.long,
        ),
        pytest.param(lambda folder: shutil.rmtree(folder), "no such file", id="no checkpoint"),
    ],
)
async def test_a_rank_joins_again_only_with_the_weights_that_the_others_have(
    change: Callable[[Path], object], reason: str, group: RankGroup, checkpoint: Path
) -> None:
    undisturbed = await draw(group, picture())
    survivor = group.rank_pids[0]
    change(checkpoint)
    os.kill(group.rank_pids[1], signal.SIGKILL)
    await group.wait_for_loss()
    for _ in range(2):
        with pytest.raises(RankDiedError, match=reason):
            await group.recover()
    assert group.placement.layout == group.full_layout
    restore(checkpoint)
    assert await group.recover() == (1,)
    assert group.rank_pids[0] == survivor
    assert await draw(group, picture()) == undisturbed


@pytest.mark.asyncio(loop_scope="module")
async def test_a_group_without_a_survivor_takes_no_other_weights_than_those_it_started_with(
    group: RankGroup, checkpoint: Path
) -> None:
    undisturbed = await draw(group, picture())
    retrain(checkpoint / WEIGHTS)
    os.kill(zygote_pid_of(group), signal.SIGKILL)
    await group.wait_for_loss()
    with pytest.raises(RankDiedError, match="put its files back, or restart the server"):
        await group.recover()
    restore(checkpoint)
    await group.recover()
    assert await draw(group, picture()) == undisturbed


@pytest.mark.asyncio(loop_scope="module")
async def test_a_living_rank_keeps_its_weights_when_its_files_are_written_to(
    group: RankGroup, checkpoint: Path
) -> None:
    undisturbed = await draw(group, picture())
    for component in ("transformer", "vae", "text_encoder_3", "text_encoder_4"):
        (weights,) = (checkpoint / component).glob("*.safetensors")
        retrain(weights)
    assert await draw(group, picture(prompt="a blue square on a red background"))
    assert await draw(group, picture()) == undisturbed


def is_serving(server: LiveServer) -> bool:
    with grpc.insecure_channel(server.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service="hidream.v1.ImageGen"), timeout=10
        )
    return answer.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.long
def test_a_server_whose_checkpoint_was_exchanged_says_what_to_do_and_goes_on_when_it_is_back(
    checkpoint: Path,
) -> None:
    generate = request(num_inference_steps=30, seed=5)
    with running_server("-m", str(checkpoint), "--devices", "0,1") as server, server.stub() as stub:
        undisturbed = follow(stub.Generate(generate))
        call = stub.Generate(generate)
        head = read_until(call, lambda event: event.progress.step >= 5)
        retrain(checkpoint / WEIGHTS)
        os.kill(server.rank_pids()[1], signal.SIGKILL)
        wait_until(
            lambda: server.info().state == server_info_pb2.SERVER_STATE_FAILED, 60, "the group is not back"
        )
        assert not is_serving(server)
        assert server.info().layout == "tp=2"
        line = f"the checkpoint in {checkpoint} has changed since the server started: put its files back, or"
        wait_until(lambda: line in server.log, 10, "the log says what to do")
        with pytest.raises(grpc.RpcError) as refused:
            follow(stub.Generate(request(num_inference_steps=2)))
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE

        restore(checkpoint)
        stream = Stream(head + list(call))
        assert stream.job.state == job_pb2.JOB_STATE_SUCCEEDED
        assert stream.images == undisturbed.images
        server.wait_until_serving()
        assert "Traceback" not in server.log
