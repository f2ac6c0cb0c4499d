"""The server on one page: `build` wires its parts, `run` opens, starts and closes them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc

from hidream.v1 import image_gen_pb2_grpc
from hidream_grpc.background import BackgroundTasks
from hidream_grpc.engine.controller import Controller
from hidream_grpc.engine.group.listener import check_temporary_folder
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.engine.step_limit import StepLimit
from hidream_grpc.engine.step_limit_file import StepLimitFile
from hidream_grpc.jobs.artifacts.artifacts import ArtifactStore
from hidream_grpc.jobs.estimates.estimator import JobEstimator
from hidream_grpc.jobs.estimates.simulation import EngineCapacity
from hidream_grpc.jobs.execution.job_spans import JobSpans
from hidream_grpc.jobs.execution.job_tools import JobTools
from hidream_grpc.jobs.job import Execution, ModelIdentity
from hidream_grpc.jobs.limits import RequestDefaults, RequestLimits
from hidream_grpc.jobs.replicas.membership import LiveModel
from hidream_grpc.jobs.replicas.messages import ReplicaPublisher
from hidream_grpc.jobs.service import JobService
from hidream_grpc.jobs.store.store import SqlJobStore
from hidream_grpc.model.checkpoint.description import CheckpointDescription, describe_checkpoint
from hidream_grpc.model.checkpoint.fingerprint import tokenizer_fingerprint_of
from hidream_grpc.model.checkpoint.tokenizers.prompt_tokens import PromptTokenCounter
from hidream_grpc.server.adopted_children import reap_adopted_children
from hidream_grpc.server.callers import CallerIdentification
from hidream_grpc.server.checks.models import ModelChoice
from hidream_grpc.server.checks.requests import RequestChecks
from hidream_grpc.server.configuration import (
    DrainTimes,
    group_config,
    log_choices,
    request_defaults,
    request_limits,
    store_locations,
    store_policy,
)
from hidream_grpc.server.health import IMAGE_GEN, HealthServicer
from hidream_grpc.server.image_gen import ImageGenServicer
from hidream_grpc.server.info import VERSIONS, ServerDescription
from hidream_grpc.server.interceptors import CallInterceptor
from hidream_grpc.server.lifecycle import drain, end, naming_flag, take_all_devices, until_stopped
from hidream_grpc.server.listening import bind, grpc_server
from hidream_grpc.server.memory import exclude_from_collection, return_freed_buffers
from hidream_grpc.server.metrics import Metrics
from hidream_grpc.server.model_folders import ModelFolders, model_folders
from hidream_grpc.server.proxies import TRUSTED_BRIDGES_FLAG, TrustedProxies
from hidream_grpc.server.readings import Readings
from hidream_grpc.server.reflection import enable_reflection
from hidream_grpc.server.signals import Signals, StoppedAtStartError
from hidream_grpc.server.tls import ServerTls, tls_files
from hidream_grpc.server.tokens import TokensFile
from hidream_grpc.server.tracing import Tracing, tracing_of
from hidream_grpc.settings import Settings

logger = logging.getLogger(__name__)

HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
SEND_LAST_EVENTS_SECONDS = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """The parts of one server, wired; nothing of it is open, listens or has started.

    Attributes:
        model_name: the name of the model that it serves, for the log.
        store_flag: the flag with which an operator chooses another job store.
        artifacts_flag: the flag with which an operator chooses another artifact store.
        listen: HOST:PORT to serve gRPC on.
        tls: encrypts what callers and the server say; None for plaintext.
        metrics_port: where Prometheus reads, on the same host; None for no metrics.
        tracing: exports spans; None for no traces.
        log_choices: says what was chosen of devices and layouts, once it is known that the server starts.
    """

    model_name: str
    group: RankGroup
    step_limit: StepLimit
    controller: Controller
    store: SqlJobStore
    store_flag: str
    artifacts: ArtifactStore
    artifacts_flag: str
    jobs: JobService
    metrics: Metrics
    health: HealthServicer
    server: grpc.aio.Server
    listen: str
    tls: ServerTls | None
    metrics_port: int | None
    tracing: Tracing | None
    drain_times: DrainTimes
    log_choices: Callable[[], None]


async def serve(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, then drain; a second signal ends at once, as does one during the start.

    Everything that can be wrong with the settings is found, and the ports are bound, before a model is
    loaded.

    Raises:
        StartupError: in one line, why the service cannot start.
    """
    signals = Signals()
    return_freed_buffers()
    background = BackgroundTasks()
    background.start(reap_adopted_children(), "reaping adopted children")
    try:
        service = build(settings)
        exclude_from_collection()
        await run(service, signals)
    except StoppedAtStartError:
        logger.info("stopped before the start was done")
    else:
        logger.info("stopped")


def build(settings: Settings) -> Service:
    """Wire the parts of a server, in the event loop that will run it.

    Raises:
        StartupError: in one line, what is wrong with the settings or the checkpoint.
    """
    folders = model_folders(settings)
    check_temporary_folder()
    checkpoint = describe_checkpoint(folders.model, folders.extra_model)
    group = RankGroup(group_config(settings, folders, checkpoint))
    step_limit = StepLimit(settings.max_step_pixels)
    limits = request_limits(settings, checkpoint)
    defaults = request_defaults(limits, checkpoint)
    token_counter = PromptTokenCounter.from_checkpoint(folders.model, folders.extra_model)
    files = tls_files(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
    tls = None if files is None else ServerTls(files)
    bridges = settings.trusted_bridges
    callers = CallerIdentification(
        None if settings.tokens_file is None else TokensFile(settings.tokens_file),
        None if settings.trusted_proxies is None else TrustedProxies(settings.trusted_proxies),
        bridges=None if bridges is None else TrustedProxies(bridges, TRUSTED_BRIDGES_FLAG),
        have_certificates=settings.tls_client_ca is not None,
    )
    locations = store_locations(settings)
    artifacts = ArtifactStore(locations.artifacts)
    metrics = Metrics()
    tracing = tracing_of(os.environ)
    record_span = None if tracing is None else tracing.record
    job_spans = JobSpans(record_span)
    store = SqlJobStore(locations.jobs, end_observers=(metrics.observe_end, job_spans.observe_end))
    health = HealthServicer()
    capacity = partial(_capacity, limits, group, step_limit)
    estimator = JobEstimator(capacity)
    controller = Controller(
        group=group,
        step_limit=step_limit,
        step_limit_file=StepLimitFile(locations.step_limit),
        step_observers=(metrics.observe_step, estimator.observe_step),
        prompt_observers=(metrics.observe_prompts,),
    )
    tools = JobTools(
        store=store,
        artifacts=artifacts,
        estimator=estimator,
        describe_execution=partial(_execution, checkpoint, group),
        chunk_bytes=limits.chunk_bytes,
        publish_to_replicas=ReplicaPublisher(store).publish,
        checkpoint_fingerprint=checkpoint.fingerprint,
        record_span=record_span,
    )
    jobs = JobService(
        tools=tools,
        engine=controller,
        model=_live_model(folders, checkpoint, limits, defaults),
        limits=limits,
        policy=store_policy(settings),
        observe_retention=metrics.observe_retention,
        observe_readiness=health.mark_ready,
        observe_late_refusal=metrics.observe_late_refusal,
        capacity=capacity,
    )
    metrics.describe_build(VERSIONS, checkpoint.name, group.placement.devices.device_type.name)
    metrics.registry.register(Readings(jobs, group, controller, step_limit))
    servicer = ImageGenServicer(
        jobs=jobs,
        checks=RequestChecks(ModelChoice(jobs, token_counter.count), limits),
        limits=limits,
        describe_server=ServerDescription(checkpoint, limits, defaults, group, jobs),
    )
    server = grpc_server(limits, CallInterceptor(metrics, callers, tracing))
    image_gen_pb2_grpc.add_ImageGenServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    enable_reflection(server, (IMAGE_GEN, HEALTH))
    return Service(
        model_name=checkpoint.name,
        group=group,
        step_limit=step_limit,
        controller=controller,
        store=store,
        store_flag=locations.jobs_flag,
        artifacts=artifacts,
        artifacts_flag=locations.artifacts_flag,
        jobs=jobs,
        metrics=metrics,
        health=health,
        server=server,
        listen=settings.listen,
        tls=tls,
        metrics_port=settings.metrics_port,
        tracing=tracing,
        drain_times=DrainTimes(settings.drain_delay_seconds, settings.grace_seconds),
        log_choices=partial(log_choices, settings, folders, checkpoint, group),
    )


async def run(service: Service, signals: Signals) -> None:
    """Open, bind, start, wait for a signal, drain, close.

    Raises:
        StartupError: in one line, why the service cannot start.
        StoppedAtStartError: a signal came before it had started.
    """
    jobs, server = service.jobs, service.server
    signals.on_hangup(partial(take_all_devices, service.group, service.step_limit))
    async with contextlib.AsyncExitStack() as ending:
        # Each of these happens even if one of them fails, the last one first.
        if service.tracing is not None:
            ending.push_async_callback(service.tracing.close)
        with naming_flag(service.store_flag):
            await signals.unless_ended(service.store.open())
            ending.push_async_callback(service.store.close)
        with naming_flag(service.artifacts_flag):
            await signals.unless_ended(service.artifacts.probe())
        host, port = bind(server, service.listen, service.tls)
        if service.metrics_port is not None:
            logger.info("metrics on port %d", service.metrics.serve(host, service.metrics_port))
        with naming_flag(service.store_flag):
            await signals.unless_ended(jobs.join())
        work = asyncio.create_task(jobs.run())
        engine = asyncio.create_task(service.controller.run(jobs))
        ending.push_async_callback(end, engine, work)
        ending.push_async_callback(server.stop, SEND_LAST_EVENTS_SECONDS)
        # Also after a second signal, or without its engine, readers must learn how a job ended.
        ending.push_async_callback(jobs.drain, grace_seconds=0)
        await server.start()
        _log_start(service, f"{host}:{port}")
        await until_stopped(signals, engine, work)
        await drain(service.drain_times, signals, service.health, jobs, engine, work)


def _log_start(service: Service, address: str) -> None:
    placement = service.group.placement
    layout, idle_devices = placement.layout, placement.devices.idle_devices
    if service.tls is not None:
        logger.info("connections need %s", service.tls)
    logger.info("listening on %s, loading model %s, layout %s", address, service.model_name, layout)
    service.log_choices()
    if idle_devices:
        logger.warning("layout %s leaves devices idle: %s", layout, ", ".join(map(str, idle_devices)))


def _capacity(limits: RequestLimits, group: RankGroup, step_limit: StepLimit) -> EngineCapacity:
    return EngineCapacity(
        max_running_jobs=limits.max_running_jobs,
        max_step_pixels=step_limit.pixels,
        step_pixels_by_size=step_limit.by_size,
        num_ranks=group.world_size,
        max_running_jobs_of_caller=limits.max_running_jobs_per_caller,
        layout=str(group.placement.layout),
    )


def _execution(checkpoint: CheckpointDescription, group: RankGroup) -> Execution:
    layout = str(group.placement.layout)
    return Execution(
        checkpoint.name, checkpoint.scheduler_name, checkpoint.shift, layout, weights=group.weights
    )


def _live_model(
    folders: ModelFolders,
    checkpoint: CheckpointDescription,
    limits: RequestLimits,
    defaults: RequestDefaults,
) -> LiveModel:
    return LiveModel(
        identity=ModelIdentity(checkpoint.name, checkpoint.variant, checkpoint.fingerprint),
        tokenizer_fingerprint=tokenizer_fingerprint_of(folders.model, folders.extra_model),
        scheduler=checkpoint.scheduler_name,
        shift=checkpoint.shift,
        limits=limits,
        defaults=defaults,
    )
