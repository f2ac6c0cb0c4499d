"""What a caller requests of the model; every layer above uses these types."""

from __future__ import annotations

import hashlib
from enum import StrEnum
from typing import NamedTuple

import msgspec

from hidream_grpc.model.checkpoint.prompt_lengths import TRAINED_PROMPT_TOKENS
from hidream_grpc.model.checkpoint.variants import MAX_SCALE_WITHOUT_GUIDANCE


class OutputFormat(StrEnum):
    """File format of the finished images; the value is Pillow's name for it."""

    PNG = "PNG"
    JPEG = "JPEG"
    WEBP = "WEBP"

    @property
    def mime_type(self) -> str:
        """Media type of such a file."""
        return f"image/{self.value.lower()}"

    @property
    def max_side_pixels(self) -> int | None:
        """Largest width and height that such a file can have; None where no model generates such a size."""
        return _MAX_SIDE_PIXELS.get(self)

    @property
    def has_quality(self) -> bool:
        """Whether such a file can trade quality for size."""
        return self is not OutputFormat.PNG


# Limits of the encoders: libjpeg allows less than the 65,535 of the format's 16 bits.
_MAX_SIDE_PIXELS = {OutputFormat.JPEG: 65_500, OutputFormat.WEBP: 16_383}


class PaddedPrompt(NamedTuple):
    """A prompt, and what its encoded form depends on beside the text encoders.

    Attributes:
        text: the prompt, which may be empty.
        num_tokens: length to which it is padded, one of `PROMPT_TOKEN_BUCKETS`; an encoder that takes fewer
            tokens pads it to these.
    """

    text: str
    num_tokens: int = TRAINED_PROMPT_TOKENS


class SampleSize(NamedTuple):
    """The size of one sample of a forward, whose samples are all of one size.

    Attributes:
        width, height: of the image, in pixels.
        prompt_tokens: length to which its prompt is padded.
    """

    width: int
    height: int
    prompt_tokens: int = TRAINED_PROMPT_TOKENS

    def __str__(self) -> str:
        size = f"{self.width}x{self.height}"
        is_trained = self.prompt_tokens == TRAINED_PROMPT_TOKENS
        return size if is_trained else f"{size} with prompts of {self.prompt_tokens} tokens"


class GenerationParameters(msgspec.Struct, frozen=True, kw_only=True):
    """One request with every field decided, exactly as it is executed.

    Attributes:
        prompt: what the images show.
        negative_prompt: what the images avoid; has an effect only with guidance.
        width, height: size of the finished images, in pixels.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; above 1 each image costs two samples a step.
        num_images: images of this request; image i is generated from seed + i.
        seed: seed of image 0; seed + num_images - 1 is at most 2^32 - 1.
        output_format: file format of the finished images.
        quality: quality of JPEG and WebP, 1 to 100.
        with_previews: also make a small image of the latents after every step.
        prompt_tokens: length to which both prompts are padded, one of `PROMPT_TOKEN_BUCKETS`. Both have one
            length, since both are in one forward.
    """

    prompt: str
    negative_prompt: str = ""
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    num_images: int = 1
    seed: int
    output_format: OutputFormat = OutputFormat.PNG
    quality: int = 90
    with_previews: bool = False
    prompt_tokens: int = TRAINED_PROMPT_TOKENS

    @property
    def digest(self) -> bytes:
        """SHA-256 of what was asked for: the same in every process, also after fields were stored or sent."""
        asked = msgspec.structs.asdict(self)
        # A caller may pass 5 for 5.0, which becomes a float when it is stored or sent.
        asked["guidance_scale"] = float(self.guidance_scale)
        # It follows from the prompts, for one checkpoint.
        del asked["prompt_tokens"]
        return hashlib.sha256(msgspec.msgpack.encode(asked)).digest()

    @property
    def uses_guidance(self) -> bool:
        """Whether each image needs an unconditional sample too."""
        return self.guidance_scale > MAX_SCALE_WITHOUT_GUIDANCE

    @property
    def prompts(self) -> tuple[PaddedPrompt, ...]:
        """Prompts that the transformer gets: the prompt, and with guidance the negative prompt after it."""
        texts = (self.prompt, self.negative_prompt) if self.uses_guidance else (self.prompt,)
        return tuple(PaddedPrompt(text, self.prompt_tokens) for text in texts)

    @property
    def sample_size(self) -> SampleSize:
        """Size of each row that this request adds to a forward of the transformer."""
        return SampleSize(self.width, self.height, self.prompt_tokens)

    @property
    def num_samples(self) -> int:
        """Rows that this request adds to one forward of the transformer."""
        return self.num_images * (2 if self.uses_guidance else 1)

    @property
    def pixel_steps(self) -> int:
        """Pixels of all images times denoising steps, by which the work of callers is measured."""
        return self.width * self.height * self.num_inference_steps * self.num_images
