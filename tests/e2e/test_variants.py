"""Dev and Fast: no guidance, and a scheduler that draws noise in every step."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from hidream_grpc.model.demo import demo_checkpoint_path
from tests.checkpoints import write_variant
from tests.live_server import running_server
from tests.streams import follow, request


@pytest.mark.parametrize(("variant", "steps", "shift"), [("dev", 28, 6.0), ("fast", 16, 3.0)])
def test_the_variant_is_read_from_the_checkpoint_and_its_images_repeat_by_seed(
    tmp_path: Path, variant: str, steps: int, shift: float
) -> None:
    folder = tmp_path / f"HiDream-I1-{variant}"
    write_variant(demo_checkpoint_path(), folder, variant)
    with running_server("--model-path", str(folder), "--grace-seconds", "5") as server, server.stub() as stub:
        info = server.info()
        assert (info.model.name, info.model.variant) == (folder.name, variant)
        assert (info.model.scheduler, info.model.shift) == ("FlowMatchLCMScheduler", shift)
        assert (info.defaults.num_inference_steps, info.defaults.guidance_scale) == (steps, 0)

        first = follow(stub.Generate(request(seed=3)))
        assert len(first.of_kind("progress")) == steps
        assert first.job.spec.guidance_scale == 0
        again, other = (follow(stub.Generate(request(seed=seed))) for seed in (3, 4))
        assert first.images == again.images != other.images

        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request(negative_prompt="blue")))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
