"""Every message between the server and its rank processes: named, typed, frozen, versioned.

Commands go down, events come up; each travels as one frame of `engine/channel.py`. The server
process imports this module, so it stays free of torch.
"""

from __future__ import annotations

import msgspec

from hidream_grpc.model.parameters import GenerationParameters

PROTOCOL_VERSION = 1


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, array_like=True):
    """A message is an array with its class name in front."""


# --- server → rank ---------------------------------------------------------------------------


class JoinGroup(_Message):
    """Leave the group of the generation before, if any, and join this one.

    Every survivor and every new rank gets the same generation; the store is at 127.0.0.1.
    """

    generation: int
    world_size: int
    store_port: int
    init_timeout_seconds: float
    collective_timeout_seconds: float


class Admission(_Message):
    """Start a request from its seed: encode its prompts, draw its first latents."""

    job_id: str
    parameters: GenerationParameters


class Decode(_Message):
    """Turn one image of a fully denoised request into a file, on one rank."""

    job_id: str
    image_index: int
    rank: int


class StepPlan(_Message):
    """One round of work. Every rank gets the same plan and does its share of it.

    In this order: forget `releases`, start `admissions`, one denoising step of `step_jobs`
    (all of one width and height, each at its own step), then `decodes`.
    """

    plan_id: int
    releases: tuple[str, ...] = ()
    admissions: tuple[Admission, ...] = ()
    step_jobs: tuple[str, ...] = ()
    decodes: tuple[Decode, ...] = ()


class Leave(_Message):
    """Leave the group and exit 0."""


Command = JoinGroup | StepPlan | Leave

# --- rank → server ---------------------------------------------------------------------------


class Hello(_Message):
    """First frame of a rank's connection."""

    rank: int
    pid: int
    protocol_version: int = PROTOCOL_VERSION


class ModelFacts(_Message):
    """What the loaded checkpoint is; the same on every rank."""

    scheduler_name: str
    shift: float
    num_parameters: int


class DeviceFacts(_Message):
    """The device of one rank; memory is 0 where it cannot be told."""

    name: str
    total_memory_bytes: int
    free_memory_bytes: int


class Loaded(_Message):
    """The rank holds its weights and waits for `JoinGroup`."""

    load_seconds: float
    model: ModelFacts
    device: DeviceFacts


class Joined(_Message):
    """The rank is in the group of this generation, and a first collective went through."""

    generation: int


class JobFault(_Message):
    """One job failed on this rank while the group is whole.

    kind is the name of an error of `hidream_grpc.errors` that the controller knows how to build.
    """

    job_id: str
    kind: str
    error_id: str


class Preview(_Message):
    """A small JPEG of the current latents of image 0."""

    job_id: str
    data: bytes


class DecodedImage(_Message):
    """One finished image as the bytes of a file."""

    job_id: str
    image_index: int
    data: bytes
    decode_seconds: float


class PlanDone(_Message):
    """This rank finished its share of the plan; the times are this rank's own."""

    plan_id: int
    encode_seconds: float
    step_seconds: float
    previews: tuple[Preview, ...] = ()
    images: tuple[DecodedImage, ...] = ()
    faults: tuple[JobFault, ...] = ()


class GroupBroken(_Message):
    """A collective failed: this rank has left the group and waits for the next `JoinGroup`."""

    generation: int
    reason: str


Event = Hello | Loaded | Joined | PlanDone | GroupBroken
