"""What a caller asks the model for. Torch-free: every layer above speaks in these."""

from __future__ import annotations

import hashlib
from enum import StrEnum

import msgspec

from hidream_grpc.model.checkpoint.variants import MAX_SCALE_WITHOUT_GUIDANCE


class OutputFormat(StrEnum):
    """File format of the finished images; the value is Pillow's name of it."""

    PNG = "PNG"
    JPEG = "JPEG"
    WEBP = "WEBP"

    @property
    def mime_type(self) -> str:
        """Media type of such a file."""
        return f"image/{self.value.lower()}"

    @property
    def max_side_pixels(self) -> int | None:
        """Largest width and height that such a file can have; None where no model draws as much."""
        return _MAX_SIDE_PIXELS.get(self)

    @property
    def has_quality(self) -> bool:
        """Whether such a file can lose something, and be smaller for it."""
        return self is not OutputFormat.PNG


# Of the encoders: libjpeg stops short of the 65,535 that the format's 16 bits would hold.
_MAX_SIDE_PIXELS = {OutputFormat.JPEG: 65_500, OutputFormat.WEBP: 16_383}


class GenerationParameters(msgspec.Struct, frozen=True, kw_only=True):
    """One request, every field decided: what is in here is what is done.

    Attributes:
        prompt: what to draw.
        negative_prompt: what to keep away from; has an effect only with guidance.
        width, height: pixels of the finished image.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; above 1 each image costs two samples a step.
        num_images: images of this request; image i is drawn from seed + i.
        seed: of image 0; seed + num_images - 1 is at most 2^32 - 1.
        output_format: of the finished images.
        quality: 1 to 100, of JPEG and WebP.
        with_previews: also make a small picture of the latents after every step.
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

    @property
    def digest(self) -> bytes:
        """SHA-256 of all fields: the same in every process, and after any journey."""
        # Callers may write 5 for 5.0; a journey makes it a float.
        same_type = msgspec.structs.replace(self, guidance_scale=float(self.guidance_scale))
        return hashlib.sha256(msgspec.msgpack.encode(same_type)).digest()

    @property
    def uses_guidance(self) -> bool:
        """Whether each image needs an unconditional sample too."""
        return self.guidance_scale > MAX_SCALE_WITHOUT_GUIDANCE

    @property
    def prompts(self) -> tuple[str, ...]:
        """Prompts that the transformer is told of: with guidance also the negative one, after the other."""
        return (self.prompt, self.negative_prompt) if self.uses_guidance else (self.prompt,)

    @property
    def num_samples(self) -> int:
        """Rows that this request adds to one forward of the transformer."""
        return self.num_images * (2 if self.uses_guidance else 1)

    @property
    def pixel_steps(self) -> int:
        """Pixels of all images, each counted once a denoising step: what a caller's work is measured by."""
        return self.width * self.height * self.num_inference_steps * self.num_images
