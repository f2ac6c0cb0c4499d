"""The server, put together on one page."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from pathlib import Path

from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from hidream.v1 import image_gen_pb2_grpc
from hidream_grpc.background import BackgroundTasks, reason_of
from hidream_grpc.engine.controller import Controller
from hidream_grpc.engine.group.listener import check_temporary_folder
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.scheduler import BatchLimits, StepScheduler
from hidream_grpc.errors import (
    ConfigurationError,
    HiDreamError,
    ModelNotFoundError,
    StoreFullError,
    StoreInUseError,
    StoreUnavailableError,
    StoreUnusableError,
    StoreVersionError,
)
from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore
from hidream_grpc.jobs.estimates.estimator import JobEstimator
from hidream_grpc.jobs.estimates.simulation import EngineCapacity
from hidream_grpc.jobs.execution.running_job import JobTools
from hidream_grpc.jobs.folders import make_writable
from hidream_grpc.jobs.job import Execution, ModelIdentity
from hidream_grpc.jobs.replicas.membership import LiveModel
from hidream_grpc.jobs.replicas.messages import ReplicaPublisher
from hidream_grpc.jobs.retention.retention import RetentionLimits
from hidream_grpc.jobs.service import JobService, StorePolicy
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.jobs.store.url import STORE_FLAG
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from hidream_grpc.model.checkpoint.description import CheckpointDescription, describe_checkpoint
from hidream_grpc.model.checkpoint.files import EXTRA_MODEL_PATH_FLAG
from hidream_grpc.model.checkpoint.fingerprint import tokenizer_fingerprint_of
from hidream_grpc.model.checkpoint.tokenizers.prompt_tokens import PromptTokenCounter
from hidream_grpc.server.adopted_children import reap_adopted_children
from hidream_grpc.server.checks.models import ModelChoice
from hidream_grpc.server.checks.requests import RequestChecks
from hidream_grpc.server.health import IMAGE_GEN, HealthServicer
from hidream_grpc.server.image_gen import ImageGenServicer
from hidream_grpc.server.info import ServerDescription
from hidream_grpc.server.interceptors import CallInterceptor
from hidream_grpc.server.limits import request_defaults, request_limits
from hidream_grpc.server.listening import bind, grpc_server
from hidream_grpc.server.memory import return_freed_buffers
from hidream_grpc.server.metrics import Metrics
from hidream_grpc.server.model_folders import utf8_path
from hidream_grpc.server.ranks import group_config
from hidream_grpc.server.signals import Signals, StoppedAtStartError, end_within
from hidream_grpc.server.tokens import TokensFile
from hidream_grpc.settings import Settings

logger = logging.getLogger(__name__)

DATA_DIR_FLAG = "--data-dir"
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
SEND_LAST_EVENTS_SECONDS = 1.0
END_SECONDS = 4.0
"""After the grace period: by then the process has ended, whatever the stores do."""


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends at once, as does one during the start.

    Everything that can be wrong with the settings is found out, and the ports are bound, before a
    model is loaded.

    Raises:
        StartupError: in one line, why the service cannot start.
    """
    signals = Signals()
    try:
        await _serve(settings, signals)
    except StoppedAtStartError:
        logger.info("stopped before the start was done")
    else:
        logger.info("stopped")


async def _serve(settings: Settings, signals: Signals) -> None:
    return_freed_buffers()
    background = BackgroundTasks()
    background.start(reap_adopted_children(), "reaping adopted children")
    settings = settings.model_copy(update=_utf8_folders(settings))
    model_path = settings.model_path or demo_checkpoint_path()
    if settings.extra_model_path is not None and not settings.extra_model_path.is_dir():
        # Also where the checkpoint holds its own: a wrong path is not passed over in silence.
        raise ModelNotFoundError(EXTRA_MODEL_PATH_FLAG, settings.extra_model_path)
    check_temporary_folder()
    checkpoint = describe_checkpoint(model_path, settings.extra_model_path)
    group = RankGroup(group_config(settings, model_path, checkpoint))
    scheduler = StepScheduler(BatchLimits(settings.max_running_jobs, settings.max_step_pixels))
    signals.on_hangup(partial(take_all_devices, group, scheduler))
    limits = request_limits(settings, checkpoint)
    defaults = request_defaults(limits, checkpoint)
    count_tokens = PromptTokenCounter.from_checkpoint(model_path, settings.extra_model_path).count

    tokens = None if settings.tokens_file is None else TokensFile(settings.tokens_file)

    metrics = Metrics()
    health = HealthServicer()

    def capacity() -> EngineCapacity:
        return EngineCapacity(
            max_running_jobs=limits.max_running_jobs,
            max_step_pixels=scheduler.max_step_pixels,
            num_ranks=group.world_size,
            max_running_jobs_of_caller=limits.max_running_jobs_per_caller,
        )

    estimator = JobEstimator(capacity)
    controller = Controller(
        group,
        scheduler,
        step_observers=(metrics.observe_step, estimator.observe_step),
        prompt_observers=(metrics.observe_prompts,),
    )
    data_directory = _data_directory(settings.data_dir)
    artifacts = ArtifactStore(settings.artifacts or data_directory / "artifacts")
    async with _open_store(settings.store, data_directory, signals) as store:
        tools = JobTools(
            store,
            artifacts,
            estimator,
            lambda: _execution(checkpoint, group),
            limits.chunk_bytes,
            ReplicaPublisher(store).publish,
            checkpoint.fingerprint,
        )
        model = LiveModel(
            ModelIdentity(checkpoint.name, checkpoint.variant, checkpoint.fingerprint),
            tokenizer_fingerprint_of(model_path, settings.extra_model_path),
            checkpoint.scheduler_name,
            checkpoint.shift,
            limits,
            defaults,
        )
        jobs = JobService(
            tools,
            controller,
            model,
            limits,
            _store_policy(settings),
            metrics.observe_retention,
            health.mark_ready,
        )
        metrics.watch(
            num_queued=lambda: jobs.num_queued,
            num_running=lambda: jobs.num_running,
            num_rank_restarts=lambda: group.num_restarts,
            num_layout_devices=lambda: group.world_size,
            num_lost_steps=lambda: controller.num_lost_steps,
            max_step_pixels=lambda: scheduler.max_step_pixels,
            is_serving=lambda: jobs.is_ready,
        )
        describe_server = ServerDescription(checkpoint, limits, defaults, group, jobs)
        checks = RequestChecks(ModelChoice(jobs, count_tokens), limits)
        servicer = ImageGenServicer(jobs, checks, limits, describe_server)

        interceptor = CallInterceptor(metrics, None if tokens is None else tokens.caller_of)
        server = grpc_server(limits, interceptor)
        image_gen_pb2_grpc.add_ImageGenServicer_to_server(servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        reflection.enable_server_reflection((IMAGE_GEN, HEALTH, reflection.SERVICE_NAME), server)
        host, port = bind(server, settings.listen)
        if settings.metrics_port is not None:
            logger.info("metrics on port %d", metrics.serve(host, settings.metrics_port))

        with _told_as_start_errors(settings.store):
            await signals.unless_ended(jobs.join())
        work = asyncio.create_task(jobs.run())
        engine = asyncio.create_task(controller.run(jobs))
        async with contextlib.AsyncExitStack() as ending:
            # Each of these happens even if one of them fails, the last one first.
            ending.push_async_callback(_end, engine, work)
            ending.push_async_callback(server.stop, SEND_LAST_EVENTS_SECONDS)
            # After a second signal, or without its engine, a job must still tell how it ended.
            ending.push_async_callback(jobs.drain, grace_seconds=0)
            await server.start()
            layout, idle_devices = group.placement.layout, group.placement.devices.idle_devices
            logger.info(
                "listening on %s:%d, loading model %s, layout %s", host, port, checkpoint.name, layout
            )
            if idle_devices:
                logger.warning("layout %s leaves devices idle: %s", layout, ", ".join(map(str, idle_devices)))
            await _until_stopped(signals, engine, work)
            await _drain(settings, signals, health, jobs, engine, work)


async def _until_stopped(signals: Signals, *tasks: asyncio.Task[None]) -> None:
    """Return on the first signal; raise what ended one of the tasks if that comes first."""
    first_signal = asyncio.create_task(signals.first.wait())
    await asyncio.wait((*tasks, first_signal), return_when=asyncio.FIRST_COMPLETED)
    first_signal.cancel()
    _raise_what_ended(tasks)


async def _drain(
    settings: Settings,
    signals: Signals,
    health: HealthServicer,
    jobs: JobService,
    *tasks: asyncio.Task[None],
) -> None:
    """Let running jobs end, unless a second signal comes; raise what ends one of the tasks meanwhile."""
    logger.info("draining for up to %g s", settings.grace_seconds)
    end_within(settings.drain_delay_seconds + settings.grace_seconds + END_SECONDS)
    health.mark_draining()
    second_signal = asyncio.create_task(signals.second.wait())
    # Load balancers send calls until their next health check.
    await asyncio.wait(
        (second_signal, *tasks), timeout=settings.drain_delay_seconds, return_when=asyncio.FIRST_COMPLETED
    )
    drained = BackgroundTasks().start(jobs.drain(settings.grace_seconds), "draining")
    await asyncio.wait((drained, second_signal, *tasks), return_when=asyncio.FIRST_COMPLETED)
    if second_signal.done():
        end_within(END_SECONDS)
    for task in (drained, second_signal):
        task.cancel()
    _raise_what_ended(tasks)


def _raise_what_ended(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        if task.done() and not task.cancelled() and (error := task.exception()) is not None:
            if not isinstance(error, HiDreamError):
                logger.critical("the server ends, since a task of it has failed", exc_info=error)
            raise error


async def _end(*tasks: asyncio.Task[None]) -> None:
    """Cancel the tasks and wait for them; what ends one meanwhile is logged, unless it is being raised."""
    raised = sys.exception()
    for task in tasks:
        task.cancel()
    for error in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(error, Exception) and error is not raised:
            logger.error("the server did not end in order", exc_info=error)


def _execution(checkpoint: CheckpointDescription, group: RankGroup) -> Execution:
    layout = str(group.placement.layout)
    return Execution(checkpoint.name, checkpoint.scheduler_name, checkpoint.shift, layout)


def take_all_devices(group: RankGroup, scheduler: StepScheduler) -> None:
    """Use the devices as they were meant to be, whatever went wrong with them before."""
    lowered_pixels = scheduler.max_step_pixels
    scheduler.forget_limit()
    if scheduler.max_step_pixels > lowered_pixels:
        logger.info("SIGHUP: a step may hold %d pixels again", scheduler.max_step_pixels)
    if group.ask_for_full_layout():
        logger.info("SIGHUP: going back to layout %s", group.full_layout)
    else:
        logger.info("SIGHUP: the layout is the one that was asked for")


def _utf8_folders(settings: Settings) -> dict[str, Path]:
    folders = {"model_path": settings.model_path, "extra_model_path": settings.extra_model_path}
    return {name: utf8_path(folder) for name, folder in folders.items() if folder is not None}


def _data_directory(data_dir: Path | None) -> Path:
    """The folder of jobs and images: what was accepted must be found again after a restart."""
    directory = (data_dir or _home_of_data() / "hidream-grpc").absolute()
    try:
        make_writable(directory)
    except OSError as error:
        raise ConfigurationError(DATA_DIR_FLAG, f"cannot write to {directory}: {error.strerror}") from None
    return directory


def _home_of_data() -> Path:
    # The XDG specification has an empty one mean none, and a relative one be wrong.
    if data_home := os.environ.get("XDG_DATA_HOME"):
        return _absolute(Path(data_home), "XDG_DATA_HOME")
    try:
        home = Path.home()
    except RuntimeError:
        home = None
    if home is None or os.environ.get("HOME") == "":
        reason = "must name a folder, since neither XDG_DATA_HOME nor HOME is set"
        raise ConfigurationError(DATA_DIR_FLAG, reason)
    return _absolute(home, "HOME") / ".local" / "share"


def _absolute(folder: Path, variable: str) -> Path:
    if not folder.is_absolute():
        reason = f"{str(folder)!r} is no absolute path; name one, or give {DATA_DIR_FLAG}"
        raise ConfigurationError(variable, reason)
    return folder


def _store_policy(settings: Settings) -> StorePolicy:
    retention = RetentionLimits(
        settings.retention_seconds,
        settings.max_retained_jobs,
        settings.max_retained_bytes,
        settings.retention_dry_run,
    )
    return StorePolicy(
        settings.lease_seconds,
        retention,
        settings.orphan_sweep_seconds,
        settings.store_outage_seconds,
    )


@contextlib.asynccontextmanager
async def _open_store(url: str | None, data_directory: Path, signals: Signals) -> AsyncIterator[SqlJobStore]:
    """The job store, for as long as the block lasts."""
    store = SqlJobStore(url or data_directory / "jobs.sqlite")
    with _told_as_start_errors(url):
        await signals.unless_ended(store.open())
    try:
        yield store
    finally:
        await store.close()


@contextlib.contextmanager
def _told_as_start_errors(store_url: str | None) -> Iterator[None]:
    """Turn what a store says at the start into one line that names the flag."""
    flag = DATA_DIR_FLAG if store_url is None else STORE_FLAG
    try:
        yield
    except (StoreInUseError, StoreUnusableError, StoreVersionError) as error:
        raise ConfigurationError(flag, str(error)) from None
    except (StoreUnavailableError, StoreFullError) as error:
        raise ConfigurationError(flag, reason_of(error)) from None
