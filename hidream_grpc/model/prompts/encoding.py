"""Encodes prompts for the transformer, on all ranks together, once per distinct prompt.

    every rank has it cached? ─→ owners run their encoders ─→ all succeeded? ─→ broadcast ─→ project

Each arrow is a collective of all ranks, so all must encode the same prompts in the same order. The ranks
agree on the errors of a prompt's encoders before they broadcast, so that no rank waits for one that failed.
"""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hidream_grpc.devices.device import Device
from hidream_grpc.model.checkpoint.text_encoders import TextEncoderName
from hidream_grpc.model.costs.activations import MAX_CACHED_PROMPTS
from hidream_grpc.model.parallel.groups import Axis
from hidream_grpc.model.parameters import PaddedPrompt
from hidream_grpc.model.prompts.text_encoders import PromptEmbeds, TextEncoders
from hidream_grpc.model.transformer.conditioning import Conditioning

EMPTY_PROMPT = PaddedPrompt("")


class CaptionProjector(Protocol):
    """The part of the transformer that depends on the prompt alone."""

    def project_captions(self, t5: Tensor, llama: Tensor) -> tuple[Tensor, Tensor]:
        """Project a prompt's states to the transformer's width; all ranks of a model must call it."""

    def embed_pooled(self, pooled: Tensor) -> Tensor:
        """Embed CLIP's pooled output."""


@dataclass(frozen=True, slots=True)
class EncodedPrompts:
    """The result of encoding some prompts.

    Attributes:
        conditionings: the encoded prompts; they are the same on every rank.
        errors: errors of this rank's encoders, by prompt; other ranks may have others.
        num_cache_hits: number of prompts, without the empty one, for which no encoder ran.
        num_cache_misses: number of prompts for which encoders ran.
    """

    conditionings: Mapping[PaddedPrompt, Conditioning]
    errors: Mapping[PaddedPrompt, Exception]
    num_cache_hits: int
    num_cache_misses: int

    def has_all_of(self, prompts: Sequence[PaddedPrompt]) -> bool:
        """Whether all of these prompts were encoded.

        Raises:
            Exception: the error of an encoder for one of them on this rank.
        """
        for prompt in prompts:
            if prompt in self.errors:
                raise self.errors[prompt]
        return all(prompt in self.conditionings for prompt in prompts)

    def require(self, prompts: Sequence[PaddedPrompt]) -> tuple[Conditioning, ...]:
        """The conditionings of these prompts, in their order.

        Raises:
            Exception: the error of an encoder for one of them on this rank.
            LookupError: a prompt failed on another rank only, or was not to be encoded at all.
        """
        if not self.has_all_of(prompts):
            raise LookupError("a prompt was not encoded")
        return tuple(self.conditionings[prompt] for prompt in prompts)


class ConditioningCache:
    """A cache of the latest prompts, and always of the empty one of each length, which guidance needs."""

    def __init__(self) -> None:
        self._latest: OrderedDict[PaddedPrompt, Conditioning] = OrderedDict()
        self._empty: dict[PaddedPrompt, Conditioning] = {}

    def __contains__(self, prompt: PaddedPrompt) -> bool:
        return prompt in self._latest or prompt in self._empty

    def __getitem__(self, prompt: PaddedPrompt) -> Conditioning:
        return self._latest[prompt] if prompt.text else self._empty[prompt]

    def keep(self, prompt: PaddedPrompt, conditioning: Conditioning) -> None:
        """Cache this prompt as the latest; the oldest one is dropped when there are too many."""
        if not prompt.text:
            self._empty[prompt] = conditioning
            return
        self._latest[prompt] = conditioning
        self._latest.move_to_end(prompt)
        if len(self._latest) > MAX_CACHED_PROMPTS:
            self._latest.popitem(last=False)


class PromptEncoder:
    """Encodes prompts on all ranks of the world, each with its own encoders and share of the transformer.

    Args:
        text_encoders: the text encoders of this rank.
        projector: the transformer of this rank.
        world: all ranks.
        device: device of this rank.
    """

    def __init__(
        self, text_encoders: TextEncoders, projector: CaptionProjector, world: Axis, device: Device
    ) -> None:
        self._text_encoders = text_encoders
        self._projector = projector
        self._world = world
        self._device = device
        self._cache = ConditioningCache()

    @torch.inference_mode()
    def encode(self, prompts: Sequence[PaddedPrompt]) -> EncodedPrompts:
        """Encode the prompts that are not cached on every rank; all ranks must call it with the same prompts.

        Args:
            prompts: the same prompts on every rank; one may occur more than once.

        Raises:
            CollectiveError: a rank is gone.
            Exception: the transformer could not project the outputs of the encoders here. This rank must
                leave the group, since the others wait for it.
        """
        distinct = tuple(dict.fromkeys(prompts))
        cached_here = [prompt in self._cache for prompt in distinct]
        # The caches of the ranks differ, since a new rank has an empty one.
        is_cached = self._all_true(cached_here)
        conditionings: dict[PaddedPrompt, Conditioning] = {}
        errors: dict[PaddedPrompt, Exception] = {}
        # Read the cache first, since encoding the others may drop entries.
        for prompt, hit in zip(distinct, is_cached, strict=True):
            if hit:
                conditionings[prompt] = self._cache[prompt]
        missing = [prompt for prompt in distinct if prompt not in conditionings]
        for prompt in missing:
            conditioning = self._encode(prompt, errors)
            if conditioning is not None:
                conditionings[prompt] = conditioning
        for prompt in distinct:
            if prompt in conditionings:
                self._cache.keep(prompt, conditionings[prompt])
        num_misses = sum(prompt.text != "" for prompt in missing)
        num_prompts = sum(prompt.text != "" for prompt in prompts)
        return EncodedPrompts(conditionings, errors, num_prompts - num_misses, num_misses)

    @torch.inference_mode()
    def blank(self, prompt_tokens: int) -> Conditioning:
        """A conditioning of zeros in the shape of all prompts that are padded to so many tokens.

        All ranks of a model must call it.
        """
        return self._project(self._text_encoders.blank(prompt_tokens))

    def _encode(self, prompt: PaddedPrompt, errors: dict[PaddedPrompt, Exception]) -> Conditioning | None:
        """Encode one prompt; None where an encoder failed on any rank."""
        outputs: dict[TextEncoderName, Tensor] = {}
        try:
            outputs = self._text_encoders.encode(prompt)
        except Exception as error:
            # Its frames hold memory that the next prompt may need.
            traceback.clear_frames(error.__traceback__)
            errors[prompt] = error
        (succeeded,) = self._all_true([prompt not in errors])
        if not succeeded:
            return None
        for name, owner in self._text_encoders.owners.items():
            self._world.broadcast(outputs[name], owner)
        return self._project(outputs)

    def _project(self, outputs: Mapping[TextEncoderName, Tensor]) -> Conditioning:
        """Project the outputs of the encoders for the transformer's blocks."""
        embeds = PromptEmbeds.from_outputs(outputs)
        t5, llama = self._projector.project_captions(embeds.t5, embeds.llama)
        return Conditioning(self._projector.embed_pooled(embeds.pooled), t5, llama)

    def _all_true(self, values: Sequence[bool]) -> list[bool]:
        return self._world.all_true(values, self._device.torch_device)
