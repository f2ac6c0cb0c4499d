"""How long a plan may take, learnt from earlier plans. Pure."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from functools import partial

from hidream_grpc.engine.protocol.messages import PlanDone, StepPlan

NUM_RECENT_PLANS = 20
LIMIT_FACTOR = 10.0

_Kind = tuple[int, int, int]


class PlanTimeouts:
    """Limits of ten times the longest of the latest plans of the same kind.

    Plans are of one kind when they have equally many prompts to encode, pixels to denoise and pixels to
    decode, each rounded to a power of two.

    Args:
        min_seconds: the least limit.
        unknown_seconds: the limit of a plan of a kind that was not run before, and of the first plan of a
            generation, in which new processes warm up.
    """

    def __init__(self, min_seconds: float, unknown_seconds: float) -> None:
        self._min_seconds = min_seconds
        self._unknown_seconds = unknown_seconds
        self._recent: defaultdict[_Kind, deque[float]] = defaultdict(
            partial(deque[float], maxlen=NUM_RECENT_PLANS)
        )
        self._is_first = True
        self._kind: _Kind = (0, 0, 0)
        # For each claim, the pixels of one image and those of a step.
        self._pixels: dict[str, tuple[int, int]] = {}
        self._decoding: set[tuple[str, int]] = set()

    def next_generation(self) -> None:
        """Note that the ranks have joined a new generation, which knows no request."""
        self._is_first = True
        self._pixels.clear()
        self._decoding.clear()

    @property
    def longest_seconds(self) -> float:
        """The limit for any work that a rank may still be doing when its plan is lost."""
        longest = max((max(recent) for recent in self._recent.values() if recent), default=0.0)
        return max(self._min_seconds, LIMIT_FACTOR * longest) if longest else self._unknown_seconds

    def start(self, plan: StepPlan) -> float:
        """Note the start of a plan; return its limit in seconds."""
        for claim_id in plan.releases:
            self._forget(claim_id)
        num_prompts = 0
        for admission in plan.admissions:
            parameters = admission.parameters
            image_pixels = parameters.width * parameters.height
            self._pixels[admission.claim_id] = (image_pixels, image_pixels * parameters.num_samples)
            num_prompts += len(parameters.prompts)
        self._decoding.update((decode.claim_id, decode.image_index) for decode in plan.decodes)
        step_pixels = sum(self._pixels.get(claim_id, (0, 0))[1] for claim_id in plan.step_claims)
        # Ranks decode in parallel, so the largest image counts.
        decode_pixels = max(
            (self._pixels.get(claim_id, (0, 0))[0] for claim_id, _ in self._decoding), default=0
        )
        self._kind = (num_prompts.bit_length(), step_pixels.bit_length(), decode_pixels.bit_length())
        if self._is_first or not self._recent[self._kind]:
            return self._unknown_seconds
        return max(self._min_seconds, LIMIT_FACTOR * max(self._recent[self._kind]))

    def done(self, answers: Sequence[PlanDone], plan_seconds: float) -> None:
        """Note how long the latest plan took, and what it finished."""
        if not self._is_first:
            self._recent[self._kind].append(plan_seconds)
        self._is_first = False
        for answer in answers:
            self._decoding.difference_update((image.claim_id, image.image_index) for image in answer.images)
            for fault in answer.faults:
                self._forget(fault.claim_id)

    def _forget(self, claim_id: str) -> None:
        self._pixels.pop(claim_id, None)
        self._decoding = {image for image in self._decoding if image[0] != claim_id}
