"""Makes the frozen values that each layer takes of the operator's settings."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hidream_grpc.devices.detect import (
    AUTO,
    DeviceSelection,
    all_devices,
    detect,
    log_choice,
    parse_devices,
    select_devices,
)
from hidream_grpc.devices.device_types import CPU, DeviceMemory, DeviceType
from hidream_grpc.devices.host_memory import host_memory
from hidream_grpc.engine.group.config import GroupConfig, GroupTimeouts
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.errors import ConfigurationError
from hidream_grpc.jobs.artifacts.objects import ARTIFACTS_FLAG
from hidream_grpc.jobs.folders import make_writable
from hidream_grpc.jobs.limits import MAX_TORCH_SEED, RequestDefaults, RequestLimits
from hidream_grpc.jobs.retention.retention import RetentionLimits
from hidream_grpc.jobs.service import StorePolicy
from hidream_grpc.jobs.store.url import STORE_FLAG
from hidream_grpc.logs import LogConfig
from hidream_grpc.model.checkpoint.configs import read_configs
from hidream_grpc.model.checkpoint.description import CheckpointDescription
from hidream_grpc.model.checkpoint.prompt_lengths import PROMPT_TOKEN_BUCKETS, padded_prompt_tokens
from hidream_grpc.model.checkpoint.sizes import MAX_PREVIEW_SIDE_PIXELS, ImageSize
from hidream_grpc.model.checkpoint.step_shapes import COMPILE_SHAPES_FLAG, StepShape, choose_compile_shapes
from hidream_grpc.model.checkpoint.variants import MAX_SCALE_WITHOUT_GUIDANCE
from hidream_grpc.model.costs.choice import ORDERS, LayoutChooser
from hidream_grpc.model.costs.model import ModelCosts, Workload
from hidream_grpc.model.image_metadata import ImageMetadata
from hidream_grpc.model.memory_requirements import MemoryRequirements
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parallel.planner import LAYOUT_FLAG, LayoutWord, choose_layout, parse_layout
from hidream_grpc.model.weight_format import WeightFormat, WeightFormats
from hidream_grpc.server.manifest_certificate import manifest_signer
from hidream_grpc.server.model_folders import ModelFolders
from hidream_grpc.settings import Settings

logger = logging.getLogger(__name__)

MAX_REQUEST_ID_BYTES = 128
MAX_LABELS = 32
MAX_LABEL_BYTES = 128

DATA_DIR_FLAG = "--data-dir"

_WORTH_TELLING = 1.02
"""How many times as fast a layout must be for the log to name it."""


@dataclass(frozen=True, slots=True)
class DrainTimes:
    """How long a server that was asked to end goes on.

    Attributes:
        delay_seconds: time in which it takes calls: load balancers send some until their next health check.
        grace_seconds: time after that for running jobs to end and to be read.
    """

    delay_seconds: float
    grace_seconds: float


@dataclass(frozen=True, slots=True)
class StoreLocations:
    """Where jobs and images are kept.

    Attributes:
        jobs: the file of a SQLite database, or the URL of a PostgreSQL one.
        jobs_flag: the flag with which an operator chooses another one.
        artifacts: a folder or the URL of a bucket.
        artifacts_flag: the flag with which an operator chooses another one.
        step_limit: the file in which the engine keeps what it learns of steps.
    """

    jobs: Path | str
    jobs_flag: str
    artifacts: Path | str
    artifacts_flag: str
    step_limit: Path


# --- engine ---------------------------------------------------------------------------------------


def group_config(settings: Settings, folders: ModelFolders, checkpoint: CheckpointDescription) -> GroupConfig:
    """The ranks that the settings ask for.

    Raises:
        StartupError: a device, a layout or a shape that cannot be, or has no room.
    """
    device_type = detect(settings.device_type)
    chooser = layout_chooser(settings, folders, checkpoint, device_type)
    requirements = chooser.requirements
    host = host_memory()
    word = _word(settings)
    devices, layout = _plan(settings, chooser, host)
    layout_instead = None
    if device_type is CPU:
        # The memory of other devices is known when a rank has opened them, before it loads.
        requirements.check(layout, dict.fromkeys(range(layout.world_size), host), host)
    elif word is not None and word in ORDERS:
        num_devices = devices.num_ranks + len(devices.idle_devices)
        layout_instead = partial(chooser.instead_of, chooser.rated(num_devices), word)
    cores_per_rank = len(os.sched_getaffinity(0)) // layout.world_size
    return GroupConfig(
        model_path=folders.model,
        extra_model_path=folders.extra_model,
        checkpoint_fingerprint=checkpoint.fingerprint,
        weights=requirements.costs.formats,
        devices=devices,
        layout=layout,
        smaller_layouts=chooser.after_a_loss(layout.world_size - 1, word),
        layout_instead=layout_instead,
        start_method=device_type.start_method,
        check_memory=requirements.check,
        reserve_bytes=requirements.reserve_bytes,
        # Proven on gloo; an experiment where the backend holds state in the device.
        replace=settings.replace or ("one" if device_type.backend == "gloo" else "all"),
        threads_per_rank=settings.threads_per_rank or max(1, cores_per_rank),
        compile_shapes=compile_shapes(settings, device_type, checkpoint),
        image_metadata=ImageMetadata(
            detail=settings.image_metadata,
            model=checkpoint.name,
            scheduler=checkpoint.scheduler_name,
            shift=checkpoint.shift,
            weights=requirements.costs.formats,
            signer=manifest_signer(settings.c2pa_certificate, settings.c2pa_key),
        ),
        timeouts=GroupTimeouts(
            load_seconds=settings.load_timeout_seconds,
            collective_seconds=settings.collective_timeout_seconds,
        ),
        log=LogConfig(settings.log_level, settings.log_format, settings.log_file),
    )


def log_choices(
    settings: Settings, folders: ModelFolders, checkpoint: CheckpointDescription, group: RankGroup
) -> None:
    """Say what `--device-type auto` chose and why, and what `--layout auto` would; nothing where it did."""
    devices, layout = group.placement.devices, group.placement.layout
    if settings.device_type == AUTO:
        log_choice(devices.device_type, is_cpu_enough=settings.model_path is None)
    if _word(settings) in ORDERS:
        return
    chooser = layout_chooser(settings, folders, checkpoint, devices.device_type)
    num_devices = devices.num_ranks + len(devices.idle_devices)
    now = chooser.rate(layout)
    best = chooser.rate(_choose(chooser, LayoutWord.AUTO, num_devices, host_memory()))
    if now.image_seconds > _WORTH_TELLING * best.image_seconds:
        logger.info(
            "layout %s; --layout auto would take %s, where each device has %.1f GB, and be %.1f times "
            "as fast for one image",
            *(layout, best.layout, chooser.needed_bytes(best.layout, LayoutWord.AUTO) / 1e9),
            now.image_seconds / best.image_seconds,
        )


def weight_formats(settings: Settings, device_type: DeviceType) -> WeightFormats:
    """The formats in which the ranks hold the weights.

    Raises:
        ConfigurationError: the devices cannot compute with them.
    """
    formats = WeightFormats(
        transformer=WeightFormat(settings.weights), text_encoders=WeightFormat(settings.text_encoder_weights)
    )
    for flag, weights in (
        ("--weights", formats.transformer),
        ("--text-encoder-weights", formats.text_encoders),
    ):
        if weights is WeightFormat.FLOAT8 and not device_type.has_float8:
            raise ConfigurationError(flag, f"no float8 on {device_type.name}; int8 takes as little memory")
    return formats


def compile_shapes(
    settings: Settings, device_type: DeviceType, checkpoint: CheckpointDescription
) -> tuple[StepShape, ...]:
    """The steps to compile for; the log says where prompts are allowed whose steps are not among them.

    Raises:
        ConfigurationError: the setting is no list of shapes, or the devices cannot compile.
    """
    shapes = choose_compile_shapes(settings.compile_shapes, device_type, checkpoint.size_limits)
    longest = padded_prompt_tokens(max(_prompt_token_limits(settings, checkpoint).values()))
    compiled = {shape.prompt_tokens for shape in shapes}
    uncompiled = [n for n in PROMPT_TOKEN_BUCKETS if n <= longest and n not in compiled]
    if shapes and uncompiled:
        logger.warning(
            "steps whose prompts are padded to %s tokens run uncompiled: %s names none",
            " or ".join(map(str, uncompiled)),
            COMPILE_SHAPES_FLAG,
        )
    return shapes


def layout_chooser(
    settings: Settings, folders: ModelFolders, checkpoint: CheckpointDescription, device_type: DeviceType
) -> LayoutChooser:
    """What layouts of the checkpoint cost on devices of a type.

    Raises:
        ConfigurationError: the devices cannot compute with the formats of the weights.
    """
    formats = weight_formats(settings, device_type)
    costs = ModelCosts(read_configs(folders.model, folders.extra_model), device_type, formats)
    requirements = MemoryRequirements(costs, _workload(settings, checkpoint, device_type))
    return LayoutChooser(requirements, device_type.speed)


def _word(settings: Settings) -> LayoutWord | None:
    """The word of `--layout`; None where it names the axes."""
    if settings.layout is None:
        return LayoutWord.TABLE
    return LayoutWord(settings.layout) if settings.layout in list(LayoutWord) else None


def _plan(settings: Settings, chooser: LayoutChooser, host: DeviceMemory) -> tuple[DeviceSelection, Layout]:
    """The devices that the ranks may use, and how these share the work; the layout may leave some idle."""
    device_type = chooser.requirements.costs.device_type
    named = parse_devices(settings.devices) if settings.devices is not None else None
    word = _word(settings)
    if word is not None and word in ORDERS:
        default = parse_layout(device_type.default_layout).world_size
        chosen_from = named or all_devices(device_type) or tuple(range(default))
        layout = _choose(chooser, word, len(chosen_from), host)
        return select_devices(device_type, chosen_from), layout
    layout = choose_layout(
        None if word is LayoutWord.TABLE else settings.layout,
        num_devices=len(named) if named is not None else None,
        default=device_type.default_layout,
        divisions=chooser.requirements.costs.divisions,
    )
    if named is not None:
        return select_devices(device_type, named), layout
    return select_devices(device_type, tuple(range(layout.world_size)), LAYOUT_FLAG), layout


def _choose(chooser: LayoutChooser, word: LayoutWord, num_devices: int, host: DeviceMemory) -> Layout:
    """The layout that a word chooses: on devices of unknown memory, as if they had enough."""
    rated = chooser.rated(num_devices)
    if chooser.requirements.costs.device_type is not CPU:
        return min(rated, key=ORDERS[word]).layout
    return chooser.best_or_leanest(rated, word, host, host).layout


def _workload(settings: Settings, checkpoint: CheckpointDescription, device_type: DeviceType) -> Workload:
    """The steps by which layouts are judged."""
    defaults = checkpoint.defaults
    return Workload.new(
        ImageSize(defaults.width, defaults.height),
        checkpoint.size_limits,
        settings.max_step_pixels,
        device_type,
        has_guidance=defaults.guidance_scale > MAX_SCALE_WITHOUT_GUIDANCE,
        max_prompt_tokens=max(_prompt_token_limits(settings, checkpoint).values()),
    )


# --- requests -------------------------------------------------------------------------------------


def request_limits(settings: Settings, checkpoint: CheckpointDescription) -> RequestLimits:
    """What requests are checked against."""
    prompt_token_limits = _prompt_token_limits(settings, checkpoint)
    return RequestLimits(
        max_prompt_tokens=min(prompt_token_limits.values()),
        max_prompt_tokens_by_encoder=prompt_token_limits,
        max_prompt_bytes=settings.max_prompt_bytes,
        size_multiple=checkpoint.size_limits.size_multiple,
        min_side_pixels=checkpoint.size_limits.min_side_pixels,
        max_pixels=checkpoint.size_limits.max_pixels,
        max_num_inference_steps=settings.max_num_inference_steps,
        max_guidance_scale=settings.max_guidance_scale,
        max_num_images=settings.max_num_images,
        # Image i is generated from seed + i.
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
        max_queued_jobs_per_caller=settings.max_queued_jobs_per_caller,
        max_running_jobs_per_caller=settings.max_running_jobs_per_caller,
        max_pixel_steps_per_minute_per_caller=settings.max_pixel_steps_per_minute_per_caller,
        max_streams_per_caller=settings.max_streams_per_caller,
    )


def _prompt_token_limits(settings: Settings, checkpoint: CheckpointDescription) -> dict[str, int]:
    limits = checkpoint.prompt_token_limits
    return {encoder: min(settings.max_prompt_tokens, limit) for encoder, limit in limits.items()}


def request_defaults(limits: RequestLimits, checkpoint: CheckpointDescription) -> RequestDefaults:
    """The checkpoint's defaults, as far as the operator's limits allow them."""
    return RequestDefaults(
        width=checkpoint.defaults.width,
        height=checkpoint.defaults.height,
        num_inference_steps=min(checkpoint.defaults.num_inference_steps, limits.max_num_inference_steps),
        guidance_scale=min(checkpoint.defaults.guidance_scale, limits.max_guidance_scale),
    )


# --- stores ---------------------------------------------------------------------------------------


def store_policy(settings: Settings) -> StorePolicy:
    """How the server deals with the store and with the files."""
    return StorePolicy(
        lease_seconds=settings.lease_seconds,
        retention=RetentionLimits(
            retention_seconds=settings.retention_seconds,
            max_retained_jobs=settings.max_retained_jobs,
            max_retained_bytes=settings.max_retained_bytes,
            is_dry_run=settings.retention_dry_run,
        ),
        orphan_sweep_seconds=settings.orphan_sweep_seconds,
        max_outage_seconds=settings.store_outage_seconds,
    )


def store_locations(settings: Settings) -> StoreLocations:
    """Where jobs and images are kept; the data folder is made where there is none.

    Raises:
        ConfigurationError: the data folder has no place, or cannot be written to.
    """
    directory = _data_directory(settings.data_dir)
    return StoreLocations(
        jobs=settings.store or directory / "jobs.sqlite",
        jobs_flag=DATA_DIR_FLAG if settings.store is None else STORE_FLAG,
        artifacts=settings.artifacts or directory / "artifacts",
        artifacts_flag=DATA_DIR_FLAG if settings.artifacts is None else ARTIFACTS_FLAG,
        step_limit=directory / "step_limit.json",
    )


def _data_directory(data_dir: Path | None) -> Path:
    """The folder of jobs and images: what was accepted must be found again after a restart."""
    directory = (data_dir or _home_of_data() / "hidream-grpc").absolute()
    try:
        make_writable(directory)
    except OSError as error:
        raise ConfigurationError(DATA_DIR_FLAG, f"cannot write to {directory}: {error.strerror}") from None
    return directory


def _home_of_data() -> Path:
    # By the XDG specification an empty one means none, and a relative one is wrong.
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
