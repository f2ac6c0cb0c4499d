"""What an image file says of itself; the same request gives the same words, at any time and on any rank."""

from __future__ import annotations

import json
from typing import Any, Literal

import msgspec

from hidream_grpc.model.manifest_signing import ManifestSigner
from hidream_grpc.model.parameters import GenerationParameters
from hidream_grpc.model.weight_format import WeightFormats

MetadataDetail = Literal["none", "mark", "full"]


class ImageMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """What a server writes into each image, the same for all of its jobs.

    Attributes:
        detail: nothing; the mark that a model generated the image; or, beside the mark, from what.
        model: the checkpoint's name.
        scheduler: class of the noise scheduler, as diffusers names it.
        shift: the scheduler's timestep shift.
        weights: the formats of the weights.
        signer: adds a signed manifest to each file; None where files have none.
    """

    detail: MetadataDetail = "none"
    model: str = ""
    scheduler: str = ""
    shift: float = 0.0
    weights: WeightFormats = msgspec.field(default_factory=WeightFormats)
    signer: ManifestSigner | None = None

    @property
    def has_mark(self) -> bool:
        """Whether files say that a model generated them."""
        return self.detail != "none"

    def document(self, parameters: GenerationParameters, image_index: int) -> dict[str, Any] | None:
        """The request that gives this image alone, and the model; None where files do not say it.

        The names are those of `ImageSpec` and `Execution` in the contract. Layout, attempt, ids and times are
        left out: they differ between files of the same image.
        """
        if self.detail != "full":
            return None
        spec: dict[str, Any] = {"prompt": parameters.prompt}
        if parameters.negative_prompt:
            spec["negative_prompt"] = parameters.negative_prompt
        spec |= {
            "width": parameters.width,
            "height": parameters.height,
            "num_inference_steps": parameters.num_inference_steps,
            "guidance_scale": float(parameters.guidance_scale),
            "seed": parameters.seed + image_index,
            "output_format": f"OUTPUT_FORMAT_{parameters.output_format.name}",
        }
        if parameters.output_format.has_quality:
            spec["quality"] = parameters.quality
        execution = {"model": self.model, "scheduler": self.scheduler, "shift": self.shift}
        formats = {"weights": self.weights.transformer, "text_encoder_weights": self.weights.text_encoders}
        execution |= {name: str(weights) for name, weights in formats.items() if weights.is_quantized}
        return {"spec": spec, "execution": execution}

    def text(self, parameters: GenerationParameters, image_index: int, *, is_ascii: bool) -> str | None:
        """The document as JSON; None where files do not say it."""
        document = self.document(parameters, image_index)
        return None if document is None else json.dumps(document, ensure_ascii=is_ascii)
