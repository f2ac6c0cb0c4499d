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
from hidream_grpc.model.parallel.layout import Layout
from hidream_grpc.model.parameters import GenerationParameters

PROTOCOL_VERSION = 7


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """A message is an array with its class name in front."""


# --- server → zygote -------------------------------------------------------------------------


class PrepareZygote(_Message, frozen=True):
    """First command of a zygote: get ready to start ranks that connect to `socket_path`.

    environment is set before anything is imported, and so holds for the ranks.
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
    """SIGKILL one child; the answer is its `ProcessEnded`, which may be under way already."""

    pid: int


ZygoteCommand = PrepareZygote | StartRank | StartStore | KillProcess

# --- zygote → server -------------------------------------------------------------------------


class ZygoteReady(_Message, frozen=True):
    """The zygote can start processes."""

    import_seconds: float


class ProcessStarted(_Message, frozen=True):
    """A rank or a store host was started; store_port is 0 for a rank."""

    pid: int
    store_port: int = 0


class StartRefused(_Message, frozen=True):
    """The zygote cannot do what it was told; reason is a line for the operator."""

    reason: str


class ProcessEnded(_Message, frozen=True):
    """A child ended; a negative exit code is the number of the signal that killed it."""

    pid: int
    exit_code: int


ZygoteEvent = ZygoteReady | ProcessStarted | StartRefused | ProcessEnded

# --- server → rank ---------------------------------------------------------------------------


class Load(_Message, frozen=True):
    """First command of a rank: open the device, then, at `LoadWeights`, load the weights and compile.

    A checkpoint of another fingerprint is refused: the server has described this one to its callers.
    counter_path is the page in which the rank says that it waits for others, see
    `engine/protocol/collective_counter.py`.
    """

    model_path: Path
    extra_model_path: Path | None
    checkpoint_fingerprint: str
    layout: Layout
    device_type: str
    local_index: int
    num_threads: int
    compile_shapes: tuple[StepShape, ...]
    counter_path: Path
    log: LogConfig


class LoadWeights(_Message, frozen=True):
    """There is room for what this rank and those beside it load."""


class JoinGroup(_Message, frozen=True):
    """Leave the group of the generation before, if any, and join this one; forget all requests.

    Every survivor and every new rank gets the same generation; the store is at 127.0.0.1.
    Weights stay; a request goes on with its next `Admission`. Until the first plan of this generation
    the rank still gives snapshots of the requests that it had.
    """

    generation: int
    world_size: int
    store_port: int
    init_timeout_seconds: float
    collective_timeout_seconds: float


class Admission(_Message, frozen=True):
    """Start a request: encode its prompts, draw its first latents, or take those of a snapshot.

    job_id and request_id are for the log lines of the rank; snapshot is empty for a start from the seed.
    """

    claim_id: str
    job_id: str
    request_id: str
    parameters: GenerationParameters
    snapshot: bytes = b""


class Decode(_Message, frozen=True):
    """Turn one image of a fully denoised request into a file, on a rank that is at no other."""

    claim_id: str
    image_index: int
    rank: int


class StepPlan(_Message, frozen=True):
    """One round of work. Every rank gets the same plan and does its share of it.

    A request is named by its claim: another claim of the same job is another request.

    In this order: forget `releases`, start `admissions`, one denoising step of `step_claims`
    (all of one width and height, each at its own step), then start `decodes`, and go on with those of
    this plan and of earlier ones until `decode_budget_seconds` are spent (None for no limit). A rank
    decodes one image at a time; it is in the `PlanDone` of the plan that it is finished in. Rank 0 hands up
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
    """Give a snapshot of a request as it was after a step; the answer is `SnapshotGiven`.

    A rank that kept its process has the state after the latest plan that was done and, where it got so far
    in the plan that was lost, the one after that too.
    """

    claim_id: str
    step: int


class Leave(_Message, frozen=True):
    """Leave the group and exit 0."""


Command = Load | LoadWeights | JoinGroup | StepPlan | GiveSnapshot | Leave

# --- rank → server ---------------------------------------------------------------------------


class Hello(_Message, frozen=True):
    """First frame of a rank's connection."""

    rank: int
    pid: int
    protocol_version: int = PROTOCOL_VERSION


class ModelFacts(_Message, frozen=True):
    """What the loaded checkpoint is; the same on every rank."""

    scheduler_name: str
    shift: float
    num_parameters: int


class DeviceFacts(_Message, frozen=True):
    """The device of one rank; memory is 0 where it cannot be told."""

    name: str
    total_memory_bytes: int
    free_memory_bytes: int


class DeviceOpened(_Message, frozen=True):
    """The rank's device works, and holds nothing of the model yet."""

    device: DeviceFacts


class Loaded(_Message, frozen=True):
    """The rank holds its weights and waits for `JoinGroup`."""

    load_seconds: float
    model: ModelFacts
    device: DeviceFacts


class LoadFailed(_Message, frozen=True):
    """The rank cannot load and ends; reason is a line for the operator.

    is_device says that its device is to blame: another one may work; is_out_of_memory that it had no room.
    """

    reason: str
    is_device: bool = False
    is_out_of_memory: bool = False


class Joined(_Message, frozen=True):
    """The rank is in the group of this generation, and a first collective went through."""

    generation: int


class JobFault(_Message, frozen=True):
    """One request failed on this rank while the group is whole.

    A request whose admission fails on any rank is forgotten by all of them; one that fails later stays
    until the controller releases it. kind is the name of an error of `hidream_grpc.errors` that the
    controller knows how to build; reason is a line for the operator where the rank has not logged the error,
    which is a SnapshotError or a NonFiniteError.
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
    """One finished image as the bytes of a file; decode_seconds is the time that the decoder ran."""

    claim_id: str
    image_index: int
    data: bytes
    decode_seconds: float


class StepSnapshot(_Message, frozen=True):
    """A request after a step, as `model.snapshot_format` has it; snapshot_seconds is what making it took."""

    claim_id: str
    step: int
    data: bytes
    snapshot_seconds: float


class PlanDone(_Message, frozen=True):
    """This rank finished its share of the plan; the times are this rank's own.

    The prompts of the plan's admissions, and whether they had to be encoded, are counted alike on
    every rank; see `model.prompt_encoding.EncodedPrompts`.
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

    A collective failed, or the work shared by all jobs did. reason holds no text of an exception; cause is
    `OUTSIDE` where this rank only noticed that others had left.
    """

    generation: int
    reason: str
    cause: LossCause = LossCause.OUTSIDE


class SnapshotGiven(_Message, frozen=True):
    """The snapshot that was asked for; data is empty where this rank does not have it."""

    claim_id: str
    step: int
    data: bytes


Event = Hello | DeviceOpened | Loaded | LoadFailed | Joined | PlanDone | GroupBroken | SnapshotGiven
