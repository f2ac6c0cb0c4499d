"""Dev and Fast: no guidance, and a scheduler that draws noise in every step."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest

from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from tests.support.checkpoints import write_variant
from tests.support.live_server import LiveServer, running_server
from tests.support.streams import follow, request


@pytest.mark.parametrize(
    ("variant", "steps", "shift"), [pytest.param("dev", 28, 6.0, marks=pytest.mark.long), ("fast", 16, 3.0)]
)
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
        assert not info.model.HasField("max_poor_guidance_scale")
        assert not info.model.warnings

        first = follow(stub.Generate(request(seed=3)))
        # Steps this short may pass while a busy reader takes the one before; the last is told.
        assert first.of_kind("progress")[-1].progress.step == steps
        assert first.job.spec.guidance_scale == 0
        again, other = (follow(stub.Generate(request(seed=seed))) for seed in (3, 4))
        assert first.images == again.images != other.images

        with pytest.raises(grpc.RpcError) as caught:
            list(stub.Generate(request(negative_prompt="blue")))
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_full_warns_of_requests_without_guidance_and_tells_trained_sizes_from_others(
    server: LiveServer,
) -> None:
    info = server.info()
    for model in (info.model, *info.live_models):
        assert (model.variant, model.max_poor_guidance_scale) == ("full", 1.0)
        (warning,) = model.warnings
        assert "a guidance_scale of 1 or less turns it off and gives poor images" in warning
    trained, others = (
        {(size.width, size.height) for size in sizes}
        for sizes in (info.recommended_sizes, info.supported_sizes)
    )
    assert trained == {
        (1024, 1024),
        *((768, 1360), (1360, 768), (880, 1168)),
        *((1168, 880), (1248, 832), (832, 1248)),
    }
    assert others == {(1024, 768), (768, 1024), (512, 512)}
