"""The server, put together on one page."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hidream.v1 import image_gen_pb2_grpc
from hidream_grpc.devices.detect import DeviceSelection, detect, parse_devices, select_devices
from hidream_grpc.engine.controller import Controller
from hidream_grpc.engine.requests import EngineState
from hidream_grpc.engine.scheduler import BatchLimits, StepScheduler
from hidream_grpc.engine.supervisor import GroupConfig, GroupTimeouts, RankGroup
from hidream_grpc.errors import AddressInUseError, ConfigurationError, ModelNotFoundError
from hidream_grpc.jobs.artifacts import ArtifactStore
from hidream_grpc.jobs.job import Execution
from hidream_grpc.jobs.limits import MAX_TORCH_SEED, RequestDefaults, RequestLimits
from hidream_grpc.jobs.service import JobService, RetentionPolicy
from hidream_grpc.logs import LogConfig
from hidream_grpc.model.checkpoint import CheckpointDescription, describe_checkpoint
from hidream_grpc.model.checkpoint_files import EXTRA_MODEL_PATH_FLAG
from hidream_grpc.model.demo import demo_checkpoint_path
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parallel.planner import LAYOUT_FLAG, ModelDivisions, choose_layout
from hidream_grpc.model.prompt_tokens import PromptTokenCounter
from hidream_grpc.model.sizes import MAX_PREVIEW_SIDE_PIXELS
from hidream_grpc.model.step_shapes import StepShape, choose_compile_shapes
from hidream_grpc.server.health import IMAGE_GEN, HealthServicer
from hidream_grpc.server.image_gen import ImageGenServicer
from hidream_grpc.server.info import ServerDescription
from hidream_grpc.server.interceptors.errors import ErrorInterceptor
from hidream_grpc.server.interceptors.observation import ObservationInterceptor
from hidream_grpc.server.memory import return_freed_buffers
from hidream_grpc.server.metrics import Metrics
from hidream_grpc.server.validation import RequestValidator
from hidream_grpc.settings import Settings

logger = logging.getLogger(__name__)

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
SEND_LAST_EVENTS_SECONDS = 2.0
MAX_PORT = 65_535
MAX_REQUEST_ID_BYTES = 128
MAX_LABELS = 32
MAX_LABEL_BYTES = 128


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends at once.

    Everything that can be wrong with the settings is found out, and the ports are bound, before a
    model is loaded.

    Raises:
        StartupError: in one line, why the service cannot start.
    """
    return_freed_buffers()
    signals = _Signals()
    model_path = settings.model_path or demo_checkpoint_path()
    if settings.extra_model_path is not None and not settings.extra_model_path.is_dir():
        # Also where the checkpoint holds its own: a wrong path is not passed over in silence.
        raise ModelNotFoundError(EXTRA_MODEL_PATH_FLAG, settings.extra_model_path)
    checkpoint = describe_checkpoint(model_path, settings.extra_model_path)
    devices, layout = _plan_ranks(settings, checkpoint)
    compile_shapes = choose_compile_shapes(
        settings.compile_shapes, devices.device_type, checkpoint.size_limits
    )
    limits = _limits(settings, checkpoint)
    defaults = _defaults(limits, checkpoint)
    count_tokens = PromptTokenCounter.from_checkpoint(model_path, settings.extra_model_path).count

    metrics = Metrics()
    health = HealthServicer()
    group = RankGroup(_group_config(settings, model_path, devices, layout, compile_shapes))
    scheduler = StepScheduler(BatchLimits(settings.max_running_jobs, settings.max_step_pixels))

    def on_state(state: EngineState) -> None:
        logger.info("the engine is %s", state)
        jobs.set_engine_state(state)
        health.mark_ready(state.takes_requests)

    controller = Controller(group, scheduler, on_state, metrics.observe_step, metrics.observe_prompts)
    with _data_directory(settings.data_dir) as data_directory:
        jobs = JobService(
            limits,
            RetentionPolicy(settings.retention_seconds, settings.max_retained_jobs),
            ArtifactStore(settings.artifacts or data_directory / "artifacts"),
            controller,
            lambda: Execution(checkpoint.name, checkpoint.scheduler_name, checkpoint.shift, str(layout)),
        )
        metrics.watch(
            num_queued=lambda: jobs.num_queued,
            num_running=lambda: jobs.num_running,
            num_rank_restarts=lambda: group.num_restarts,
            is_serving=lambda: jobs.takes_requests,
        )
        describe_server = ServerDescription(checkpoint, limits, defaults, devices, str(layout), group, jobs)
        validator = RequestValidator(limits, defaults, count_tokens)
        # The stubs call every RPC abstract; those that are missing answer UNIMPLEMENTED.
        servicer = ImageGenServicer(  # type: ignore[abstract]
            jobs, validator, limits.max_streams, describe_server
        )

        server = _grpc_server(limits, (ObservationInterceptor(metrics), ErrorInterceptor()))
        image_gen_pb2_grpc.add_ImageGenServicer_to_server(servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        reflection.enable_server_reflection((IMAGE_GEN, HEALTH, reflection.SERVICE_NAME), server)
        host, port = _bind(server, settings.listen)
        if settings.metrics_port is not None:
            logger.info("metrics on port %d", metrics.serve(host, settings.metrics_port))

        engine = asyncio.create_task(controller.run(jobs))
        try:
            await server.start()
            logger.info(
                "listening on %s:%d, loading model %s, layout %s", host, port, checkpoint.name, layout
            )
            if devices.idle_devices:
                idle = ", ".join(str(device) for device in devices.idle_devices)
                logger.warning("layout %s leaves devices idle: %s", layout, idle)
            await _until_stopped(signals, engine)
            await _drain(settings, signals, health, jobs, engine)
        finally:
            # After a second signal, or without its engine, a job must still tell how it ended.
            await jobs.drain(grace_seconds=0)
            await server.stop(SEND_LAST_EVENTS_SECONDS)
            engine.cancel()
            await asyncio.wait((engine,))
    logger.info("stopped")


async def _until_stopped(signals: _Signals, engine: asyncio.Task[None]) -> None:
    """Return on the first signal; raise what ended the engine if that comes first."""
    first_signal = asyncio.create_task(signals.first.wait())
    await asyncio.wait((engine, first_signal), return_when=asyncio.FIRST_COMPLETED)
    first_signal.cancel()
    if engine.done():
        engine.result()


async def _drain(
    settings: Settings,
    signals: _Signals,
    health: HealthServicer,
    jobs: JobService,
    engine: asyncio.Task[None],
) -> None:
    """Let accepted jobs end, unless a second signal comes; raise what ends the engine meanwhile."""
    logger.info("draining for up to %g s", settings.grace_seconds)
    health.mark_draining()
    second_signal = asyncio.create_task(signals.second.wait())
    # Load balancers send calls until their next health check.
    await asyncio.wait(
        (second_signal, engine), timeout=settings.drain_delay_seconds, return_when=asyncio.FIRST_COMPLETED
    )
    drained = asyncio.create_task(jobs.drain(settings.grace_seconds))
    await asyncio.wait((drained, second_signal, engine), return_when=asyncio.FIRST_COMPLETED)
    for task in (drained, second_signal):
        task.cancel()
    if engine.done():
        engine.result()


class _Signals:
    """The first and the second SIGTERM or SIGINT."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        (self.second if self.first.is_set() else self.first).set()


def _plan_ranks(settings: Settings, checkpoint: CheckpointDescription) -> tuple[DeviceSelection, Layout]:
    """The devices of the ranks, and how these share the work; what was named beyond them stays idle."""
    device_type = detect(settings.device_type)
    named = parse_devices(settings.devices) if settings.devices is not None else None
    layout = choose_layout(
        settings.layout,
        num_devices=len(named) if named is not None else None,
        default=device_type.default_layout,
        divisions=ModelDivisions(checkpoint.num_attention_heads, checkpoint.num_routed_experts),
    )
    if named is not None:
        devices = select_devices(device_type, named)
    else:
        devices = select_devices(device_type, tuple(range(layout.world_size)), LAYOUT_FLAG)
    return devices.first(layout.world_size), layout


def _group_config(
    settings: Settings,
    model_path: Path,
    devices: DeviceSelection,
    layout: Layout,
    compile_shapes: tuple[StepShape, ...],
) -> GroupConfig:
    device_type = devices.device_type
    cores_per_rank = len(os.sched_getaffinity(0)) // devices.num_ranks
    return GroupConfig(
        model_path=model_path,
        extra_model_path=settings.extra_model_path,
        device_type=device_type.name,
        local_indices=tuple(devices.local_index(rank) for rank in range(devices.num_ranks)),
        layout=layout,
        environment=devices.environment(os.environ),
        start_method=device_type.start_method,
        # Proven on gloo; an experiment where the backend holds state in the device.
        replace=settings.replace or ("one" if device_type.backend == "gloo" else "all"),
        threads_per_rank=settings.threads_per_rank or max(1, cores_per_rank),
        compile_shapes=compile_shapes,
        timeouts=GroupTimeouts(
            load_seconds=settings.load_timeout_seconds,
            collective_seconds=settings.collective_timeout_seconds,
        ),
        log=LogConfig(settings.log_level, settings.log_format, settings.log_file),
    )


def _limits(settings: Settings, checkpoint: CheckpointDescription) -> RequestLimits:
    return RequestLimits(
        max_prompt_tokens=checkpoint.max_prompt_tokens,
        max_prompt_bytes=settings.max_prompt_bytes,
        size_multiple=checkpoint.size_limits.size_multiple,
        min_side_pixels=checkpoint.size_limits.min_side_pixels,
        max_pixels=checkpoint.size_limits.max_pixels,
        max_num_inference_steps=settings.max_num_inference_steps,
        max_guidance_scale=settings.max_guidance_scale,
        max_num_images=settings.max_num_images,
        # Image i is drawn from seed + i.
        max_seed=MAX_TORCH_SEED - (settings.max_num_images - 1),
        max_queued_jobs=settings.max_queued_jobs,
        max_running_jobs=settings.max_running_jobs,
        max_streams=settings.max_streams,
        max_request_id_bytes=MAX_REQUEST_ID_BYTES,
        max_labels=MAX_LABELS,
        max_label_bytes=MAX_LABEL_BYTES,
        max_receive_message_bytes=settings.max_receive_message_bytes,
        chunk_bytes=settings.chunk_bytes,
        max_preview_side_pixels=MAX_PREVIEW_SIDE_PIXELS,
    )


def _defaults(limits: RequestLimits, checkpoint: CheckpointDescription) -> RequestDefaults:
    """The checkpoint's, as far as the operator's limits allow."""
    return RequestDefaults(
        width=checkpoint.defaults.width,
        height=checkpoint.defaults.height,
        num_inference_steps=min(checkpoint.defaults.num_inference_steps, limits.max_num_inference_steps),
        guidance_scale=min(checkpoint.defaults.guidance_scale, limits.max_guidance_scale),
    )


def _grpc_server(
    limits: RequestLimits, interceptors: tuple[grpc.aio.ServerInterceptor, ...]
) -> grpc.aio.Server:
    return grpc.aio.server(
        interceptors=interceptors,
        options=(
            # With it a second server would share the port without a word.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", limits.max_receive_message_bytes),
            # Together these notice a frozen client in seconds instead of a minute.
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.http2.ping_timeout_ms", 10_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ),
    )


def _bind(server: grpc.aio.Server, listen: str) -> tuple[str, int]:
    host, colon, port = listen.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host or "[" in host:
        colon = ""
    if not host or not colon or not port.isdecimal() or int(port) > MAX_PORT:
        raise ConfigurationError("--listen", f"{listen!r} is not HOST:PORT (an IPv6 address in brackets)")
    _check_free(host, int(port), listen)
    try:
        bound = server.add_insecure_port(listen)
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise AddressInUseError("--listen", listen)
    return host, bound


def _check_free(host: str, port: int, listen: str) -> None:
    """Find out what grpc does not say: whether the address is in use, or is none of this machine's."""
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUseError("--listen", listen) from None
        # Python adds the address to the reason, in parentheses.
        reason = str(error.strerror).partition(" (")[0]
        raise ConfigurationError("--listen", f"cannot listen on {listen}: {reason}") from None


@contextlib.contextmanager
def _data_directory(data_dir: Path | None) -> Iterator[Path]:
    """A folder of this process, in the one that was named; it goes when the server does, as its jobs do."""
    try:
        if data_dir is not None:
            data_dir.mkdir(parents=True, exist_ok=True)
        directory = tempfile.TemporaryDirectory(prefix="hidream-", dir=data_dir)
    except OSError as error:
        raise ConfigurationError("--data-dir", f"cannot write to {data_dir}: {error.strerror}") from None
    with directory as path:
        yield Path(path)
