"""What an image file of the server says of itself."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer
from google.protobuf.json_format import MessageToDict, ParseDict

from hidream.files import ImageFileFormat
from hidream.terminal import table
from hidream.v1 import image_pb2, job_pb2

if TYPE_CHECKING:
    from PIL import Image

_TEXT_KEYWORD = "hidream"
_ASCII = b"ASCII\0\0\0"
_MARK = b"trainedAlgorithmicMedia"


@dataclass(frozen=True, slots=True)
class GeneratedImage:
    """An image file, and what it says of itself.

    Attributes:
        path: the file.
        data: its bytes.
        is_marked: whether it says that a model generated it.
        has_manifest: whether it has a C2PA manifest, which nobody has verified here.
        spec: the request that gives this image alone; None where the file does not say it.
        execution: the model that generated it; empty where the file does not say it.
    """

    path: Path
    data: bytes
    is_marked: bool
    has_manifest: bool
    spec: image_pb2.ImageSpec | None
    execution: job_pb2.Execution

    @classmethod
    def read(cls, text: str) -> GeneratedImage:
        """The image of a path; BadParameter where it is no image, or says nothing of itself."""
        path = Path(text)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise typer.BadParameter(f"{path}: {error.strerror}") from None
        try:
            with _opened(data) as image:
                is_marked = _MARK in _bytes(image.info.get("xmp"))
                has_manifest = _has_manifest(image, data)
                document = _document(image)
            spec, execution = None, job_pb2.Execution()
            if document is not None:
                spec = ParseDict(document["spec"], image_pb2.ImageSpec(), ignore_unknown_fields=True)
                ParseDict(document["execution"], execution, ignore_unknown_fields=True)
        except typer.BadParameter:
            raise
        # Pillow and the parsers raise many kinds for a file that is damaged or of something else.
        except Exception:
            raise typer.BadParameter(f"{path}: cannot be read as an image of this service") from None
        if spec is None and not is_marked and not has_manifest:
            raise typer.BadParameter(f"{path}: does not say how it was generated")
        return cls(path, data, is_marked, has_manifest, spec, execution)

    @classmethod
    def read_with_request(cls, text: str) -> GeneratedImage:
        """The image of a path; BadParameter where it does not say its request."""
        image = cls.read(text)
        if image.spec is None:
            raise typer.BadParameter(f"{image.path}: does not say from what it was generated")
        return image

    @property
    def file_format(self) -> ImageFileFormat | None:
        """The format that its request named; None for none, or one that this client does not know."""
        if self.spec is None:
            return None
        value_of, number = image_pb2.OutputFormat.Value, self.spec.output_format
        known = {value_of(f"OUTPUT_FORMAT_{each.name}"): each for each in ImageFileFormat}
        return known.get(number)

    def arguments(self, file_format: ImageFileFormat) -> dict[str, Any]:
        """What `Client.generate` takes to generate it again, but for the format itself."""
        said = {field.name: value for field, value in self.spec.ListFields()} if self.spec else {}
        said.pop("output_format", None)
        if file_format is not self.file_format:
            # One format's quality means nothing in another.
            said.pop("quality", None)
        return {**said, "model": self.execution.model or None}

    def compared_with(self, data: bytes) -> str:
        """Return in words whether another file is the same, and how far its pixels are from these."""
        if data == self.data:
            return f"the same bytes as {self.path}"
        from PIL import ImageChops

        with _opened(self.data) as image, _opened(data) as other:
            if image.size != other.size:
                return f"not the same bytes as {self.path}: another size"
            difference = ImageChops.difference(image.convert("RGB"), other.convert("RGB"))
        extrema = cast(tuple[tuple[int, int], ...], difference.getextrema())
        largest = max(high for _, high in extrema)
        pixels = f"pixels differ by at most {largest} of 255" if largest else "the pixels are the same"
        return f"not the same bytes as {self.path}: {pixels}"

    def table(self) -> str:
        """Return what the file says, one fact a line."""
        return table(self._rows())

    def json(self) -> str:
        """Return what the file says as JSON, in the names of the contract."""
        said: dict[str, Any] = {"is_generated": self.is_marked, "has_c2pa_manifest": self.has_manifest}
        for name, message in (("spec", self.spec), ("execution", self.execution)):
            if self.spec is not None and message is not None:
                said[name] = MessageToDict(message, preserving_proto_field_name=True)
        return json.dumps(said, indent=2, ensure_ascii=False)

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "generated", "by a model (trainedAlgorithmicMedia)" if self.is_marked else ""
        yield "C2PA", "has a manifest, not verified here" if self.has_manifest else ""
        if (spec := self.spec) is None:
            return
        yield "prompt", _printable(spec.prompt)
        yield "negative", _printable(spec.negative_prompt)
        yield (
            "image",
            f"{spec.width}×{spec.height}, {spec.num_inference_steps} steps, "
            f"guidance {spec.guidance_scale:g}, seed {spec.seed}",
        )
        quality = f", quality {spec.quality}" if spec.HasField("quality") else ""
        yield "format", f"{self.file_format}{quality}" if self.file_format else ""
        yield "model", _printable(self.execution.model)
        yield "scheduler", f"{_printable(self.execution.scheduler)}, shift {self.execution.shift:g}"
        yield "weights", _printable(self.execution.weights)
        yield "encoders", _printable(self.execution.text_encoder_weights)


def _opened(data: bytes) -> Image.Image:
    try:
        # Few need it: it is an extra of this package.
        from PIL import Image
    except ImportError:
        raise typer.BadParameter("needs Pillow: pip install 'hidream-client[images]'") from None
    return Image.open(io.BytesIO(data), formats=[file_format.name for file_format in ImageFileFormat])


def _document(image: Image.Image) -> Any:
    """The JSON in a file; None where there is none."""
    from PIL import ExifTags

    if text := image.info.get(_TEXT_KEYWORD):
        return json.loads(text)
    comment = _bytes(image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment))
    return json.loads(comment.removeprefix(_ASCII)) if comment.startswith(_ASCII + b"{") else None


def _has_manifest(image: Image.Image, data: bytes) -> bool:
    """Whether a file has what C2PA calls a manifest store, in the place that is its own in each format."""
    match image.format:
        case "PNG":
            chunks = getattr(image, "private_chunks", ())
            return any(chunk[0] == b"caBX" for chunk in chunks)
        case "JPEG":
            segments = getattr(image, "applist", ())
            return any(name == "APP11" and b"jumdc2pa" in content for name, content in segments)
        case _:
            return b"C2PA" in _riff_chunks(data)


def _riff_chunks(data: bytes) -> Iterator[bytes]:
    """The names of the chunks of a WebP."""
    # Behind "RIFF", the size of the whole and "WEBP".
    position = 12
    while position + 8 <= len(data):
        yield data[position : position + 4]
        size = int.from_bytes(data[position + 4 : position + 8], "little")
        position += 8 + size + size % 2


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value or "").encode()


def _printable(text: str) -> str:
    """The text on one line; a file of somebody else's must not steer the terminal."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in " ".join(text.split()))
