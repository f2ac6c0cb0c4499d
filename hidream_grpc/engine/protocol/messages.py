"""Every message between the server, its zygote and its rank processes: named, typed, frozen, versioned.

Commands go down, events come up; each travels as one frame of `engine/protocol/channel.py`. The server
process imports this module, so it stays free of torch.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from hidream_grpc.devices.device_types import StartMethod
from hidream_grpc.errors import LossCause
from hidream_grpc.logs import LogConfig
from hidream_grpc.model.checkpoint.step_shapes import StepShape
from hidream_grpc.model.image_metadata import ImageMetadata
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parameters import GenerationParameters
from hidream_grpc.model.weight_format import WeightFormats

PROTOCOL_VERSION = 11


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """Base of all messages: an array with the class name as its first entry."""


# --- server → zygote -------------------------------------------------------------------------


class PrepareZygote(_Message, frozen=True):
    """First command to a zygote: get ready to start ranks, which connect to `socket_path`.

    `environment` is set before anything is imported, and is inherited by the ranks.
    """

    start_method: StartMethod
    environment: dict[str, str]
    socket_path: Path
    log: LogConfig


class StartRank(_Message, frozen=True):
    """Start the process of one rank; the answer is `ProcessStarted` or `StartRefused`."""

    rank: int


class StartStore(_Message, frozen=True):
    """Start a host of torch's TCPStore; the answer is `ProcessStarted` or `StartRefused`."""


class KillProcess(_Message, frozen=True):
    """Send SIGKILL to one child; the answer is its `ProcessEnded`, which may be on its way already."""

    pid: int


ZygoteCommand = PrepareZygote | StartRank | StartStore | KillProcess

# --- zygote → server -------------------------------------------------------------------------


class ZygoteReady(_Message, frozen=True):
    """The zygote can start processes."""

    import_seconds: float


class ProcessStarted(_Message, frozen=True):
    """A rank or a store host was started; `store_port` is 0 for a rank."""

    pid: int
    store_port: int = 0


class StartRefused(_Message, frozen=True):
    """The zygote cannot execute the command; `reason` is a line for the operator."""

    reason: str


class ProcessEnded(_Message, frozen=True):
    """A child ended; a negative exit code is minus the number of the signal that killed it."""

    pid: int
    exit_code: int


ZygoteEvent = ZygoteReady | ProcessStarted | StartRefused | ProcessEnded

# --- server → rank ---------------------------------------------------------------------------


class Load(_Message, frozen=True):
    """First command to a rank: open the device and then, at `LoadWeights`, load the weights and compile.

    A checkpoint of another fingerprint is refused, since the server has described this one to its callers.
    `counter_path` is the page in which the rank counts its collectives, see
    `engine/protocol/collective_counter.py`; `reserve_bytes` stay free of text encoders on the device.
    """

    model_path: Path
    extra_model_path: Path | None
    checkpoint_fingerprint: str
    weights: WeightFormats
    layout: Layout
    device_type: str
    local_index: int
    num_threads: int
    compile_shapes: tuple[StepShape, ...]
    image_metadata: ImageMetadata
    counter_path: Path
    log: LogConfig
    reserve_bytes: int = 0


class LoadWeights(_Message, frozen=True):
    """Permission to load: this rank and the other starting ranks have room for their weights."""


class JoinGroup(_Message, frozen=True):
    """Leave the group of the previous generation, if any, and join this one without any request.

    Every survivor and every new rank gets the same command; the store is at 127.0.0.1. Weights stay loaded; a
    request goes on with its next `Admission`. Until the first plan of this generation the rank still gives
    snapshots of the requests that it had.
    """

    generation: int
    world_size: int
    store_port: int
    init_timeout_seconds: float
    collective_timeout_seconds: float


class Admission(_Message, frozen=True):
    """Start a request: encode its prompts, and generate its first latents or take them from a snapshot.

    `log_fields` are what log lines of the rank about it carry; `snapshot` is empty at a start from the seed.
    """

    claim_id: str
    log_fields: dict[str, str]
    parameters: GenerationParameters
    snapshot: bytes = b""


class Decode(_Message, frozen=True):
    """Turn one image of a fully denoised request into a file, on a rank that decodes no other image."""

    claim_id: str
    image_index: int
    rank: int


class StepPlan(_Message, frozen=True):
    """One round of work. Every rank gets the same plan and does its share of it.

    A request is named by its claim: another claim of the same job is another request.

    A rank works in this order. It forgets `releases` and starts `admissions`. It runs one denoising step of
    `step_claims`, which have one width and height, each at its own step. It starts its `decodes`, and goes on
    with those of this plan and of earlier ones until `decode_budget_seconds` are spent (None for no limit). A
    rank decodes one image at a time, which is in the `PlanDone` of the plan that finishes it. Rank 0 returns
    a snapshot of `snapshot_claim`, one of the `step_claims`, after its step.
    """

    plan_id: int
    releases: tuple[str, ...] = ()
    admissions: tuple[Admission, ...] = ()
    step_claims: tuple[str, ...] = ()
    snapshot_claim: str | None = None
    decodes: tuple[Decode, ...] = ()
    decode_budget_seconds: float | None = None


class GiveSnapshot(_Message, frozen=True):
    """Return a snapshot of a request as it was after a step; the answer is `SnapshotGiven`.

    A rank that kept its process has the state after the latest finished plan and, if it got so far in the
    lost plan, the state after that one too.
    """

    claim_id: str
    step: int


class Leave(_Message, frozen=True):
    """Leave the group, and exit with code 0."""


Command = Load | LoadWeights | JoinGroup | StepPlan | GiveSnapshot | Leave

# --- rank → server ---------------------------------------------------------------------------


class Hello(_Message, frozen=True):
    """First message of a rank, which names it and its version of the protocol."""

    rank: int
    pid: int
    protocol_version: int = PROTOCOL_VERSION


class ModelFacts(_Message, frozen=True):
    """Facts of the loaded checkpoint; the same on every rank."""

    scheduler_name: str
    shift: float
    num_parameters: int


class DeviceFacts(_Message, frozen=True):
    """Facts of the device of one rank; memory is 0 where it is unknown."""

    name: str
    total_memory_bytes: int
    free_memory_bytes: int


class DeviceOpened(_Message, frozen=True):
    """The device of the rank works, and holds nothing of the model yet."""

    device: DeviceFacts


class Loaded(_Message, frozen=True):
    """The rank holds its weights and waits for `JoinGroup`."""

    load_seconds: float
    model: ModelFacts
    device: DeviceFacts


class LoadFailed(_Message, frozen=True):
    """The rank cannot load and ends; `reason` is a line for the operator.

    `is_device` says that its device is the cause, so that another one may work; `is_out_of_memory` that it
    had no room.
    """

    reason: str
    is_device: bool = False
    is_out_of_memory: bool = False


class Joined(_Message, frozen=True):
    """The rank is in the group of this generation, and a first collective has succeeded."""

    generation: int


class JobFault(_Message, frozen=True):
    """One request failed on this rank while the group is whole.

    A request whose admission fails on any rank is forgotten by all of them; one that fails later stays until
    the controller releases it. `kind` is the name of an error of `hidream_grpc.errors` that the controller
    knows how to build. `reason` is a line for the operator where the rank has not logged the error, as with a
    SnapshotError or a NonFiniteError.
    """

    claim_id: str
    kind: str
    error_id: str
    reason: str = ""


class Preview(_Message, frozen=True):
    """A small JPEG of the current latents of image 0."""

    claim_id: str
    data: bytes


class DecodedImage(_Message, frozen=True):
    """One finished image as the bytes of a file; `decode_seconds` is the time that the decoder ran."""

    claim_id: str
    image_index: int
    data: bytes
    decode_seconds: float


class StepSnapshot(_Message, frozen=True):
    """A snapshot of a request after a step, as `model.snapshot_format` packs it, and the time it took."""

    claim_id: str
    step: int
    data: bytes
    snapshot_seconds: float


class PlanDone(_Message, frozen=True):
    """This rank has finished its share of the plan; the times are its own.

    The numbers of prompts that were cached, or had to be encoded, are the same on every rank; see
    `model.prompts.encoding.EncodedPrompts`.
    """

    plan_id: int
    encode_seconds: float
    step_seconds: float
    num_prompt_cache_hits: int = 0
    num_prompt_cache_misses: int = 0
    previews: tuple[Preview, ...] = ()
    snapshot: StepSnapshot | None = None
    images: tuple[DecodedImage, ...] = ()
    faults: tuple[JobFault, ...] = ()


class GroupBroken(_Message, frozen=True):
    """This rank has left the group and waits for the next `JoinGroup`.

    A collective failed, or the work shared by all jobs did. `reason` holds no text of an exception; `cause`
    is `OUTSIDE` where this rank only noticed that others had left.
    """

    generation: int
    reason: str
    cause: LossCause = LossCause.OUTSIDE


class SnapshotGiven(_Message, frozen=True):
    """The requested snapshot; `data` is empty where this rank does not have it."""

    claim_id: str
    step: int
    data: bytes


Event = Hello | DeviceOpened | Loaded | LoadFailed | Joined | PlanDone | GroupBroken | SnapshotGiven
