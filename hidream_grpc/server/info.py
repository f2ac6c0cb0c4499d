"""Makes the answer of `GetServerInfo`."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import time
from collections.abc import Iterable

from hidream.v1 import server_info_pb2
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.requests import EngineState
from hidream_grpc.jobs.job import JobState, ModelIdentity
from hidream_grpc.jobs.limits import RequestDefaults, RequestLimits
from hidream_grpc.jobs.service import JobService
from hidream_grpc.model.checkpoint.description import CheckpointDescription
from hidream_grpc.model.checkpoint.sizes import ImageSize
from hidream_grpc.model.checkpoint.variants import MAX_SCALE_WITHOUT_GUIDANCE, default_schedule
from hidream_grpc.server import convert
from hidream_grpc.version import SERVER_VERSION

_STATES = {
    EngineState.STARTING: server_info_pb2.SERVER_STATE_STARTING,
    EngineState.SERVING: server_info_pb2.SERVER_STATE_SERVING,
    EngineState.RECOVERING: server_info_pb2.SERVER_STATE_RECOVERING,
    EngineState.FAILED: server_info_pb2.SERVER_STATE_FAILED,
    EngineState.STOPPED: server_info_pb2.SERVER_STATE_DRAINING,
}
VERSIONS = server_info_pb2.Versions(
    server=SERVER_VERSION,
    python=platform.python_version(),
    grpcio=importlib.metadata.version("grpcio"),
    torch=importlib.metadata.version("torch"),
    diffusers=importlib.metadata.version("diffusers"),
    transformers=importlib.metadata.version("transformers"),
)
"""What runs here."""


class ServerDescription:
    """Describes the running server whenever it is called."""

    def __init__(
        self,
        checkpoint: CheckpointDescription,
        limits: RequestLimits,
        defaults: RequestDefaults,
        group: RankGroup,
        jobs: JobService,
    ) -> None:
        self._checkpoint = checkpoint
        self._limits = limits
        self._defaults = defaults
        self._group = group
        self._jobs = jobs
        self._start_time = time.time()

    def __call__(self) -> server_info_pb2.ServerInfo:
        """The server as it is now."""
        loaded, placement = self._group.loaded, self._group.placement
        checkpoint = self._checkpoint
        state = _STATES[self._jobs.readiness.engine_state]
        return server_info_pb2.ServerInfo(
            state=server_info_pb2.SERVER_STATE_DRAINING if self._jobs.readiness.is_draining else state,
            model=_model_info(
                ModelIdentity(checkpoint.name, checkpoint.variant, checkpoint.fingerprint),
                checkpoint.scheduler_name,
                checkpoint.shift,
                loaded[0].model.num_parameters if loaded else 0,
                checkpoint.trained_prompt_tokens,
            ),
            live_models=[
                _model_info(model.identity, model.scheduler, model.shift) for model in self._jobs.live_models
            ],
            layout=str(placement.layout),
            devices=[
                server_info_pb2.DeviceInfo(
                    rank=rank,
                    device_type=placement.devices.device_type.name,
                    name=facts.device.name,
                    total_memory_bytes=facts.device.total_memory_bytes,
                    free_memory_bytes=facts.device.free_memory_bytes,
                )
                for rank, facts in enumerate(loaded)
            ],
            defaults=server_info_pb2.RequestDefaults(**dataclasses.asdict(self._defaults)),
            limits=server_info_pb2.RequestLimits(**dataclasses.asdict(self._limits)),
            recommended_sizes=_sizes(checkpoint.size_limits.recommended()),
            supported_sizes=_sizes(checkpoint.size_limits.supported()),
            jobs=server_info_pb2.JobCounts(
                queued=self._jobs.num_queued,
                running=self._jobs.num_running,
                succeeded=self._jobs.num_ended(JobState.SUCCEEDED),
                failed=self._jobs.num_ended(JobState.FAILED),
                cancelled=self._jobs.num_ended(JobState.CANCELLED),
                total=self._jobs.num_accepted,
            ),
            versions=VERSIONS,
            start_time=convert.timestamp(self._start_time),
            generation=self._group.generation,
            num_rank_restarts=self._group.num_restarts,
            idle_devices=placement.devices.idle_devices,
            weights=self._group.weights.transformer,
            text_encoder_weights=self._group.weights.text_encoders,
        )


def _model_info(
    identity: ModelIdentity,
    scheduler: str,
    shift: float,
    num_parameters: int = 0,
    trained_prompt_tokens: int = 0,
) -> server_info_pb2.ModelInfo:
    info = server_info_pb2.ModelInfo(
        name=identity.name,
        variant=identity.variant,
        scheduler=scheduler,
        shift=shift,
        num_parameters=num_parameters,
        fingerprint=identity.fingerprint,
        trained_prompt_tokens=trained_prompt_tokens,
    )
    if default_schedule(scheduler, shift).needs_guidance:
        info.max_poor_guidance_scale = MAX_SCALE_WITHOUT_GUIDANCE
        info.warnings.append(
            f"{identity.name} is trained with classifier-free guidance: a guidance_scale of "
            f"{MAX_SCALE_WITHOUT_GUIDANCE:g} or less turns it off and gives poor images"
        )
    return info


def _sizes(sizes: Iterable[ImageSize]) -> list[server_info_pb2.ImageSize]:
    return [server_info_pb2.ImageSize(width=size.width, height=size.height) for size in sizes]
