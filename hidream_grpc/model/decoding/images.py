"""Encodes pixels into the bytes of an image file."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image
from PIL.PngImagePlugin import PngInfo

from hidream_grpc.model.parameters import OutputFormat

MIN_FULL_COLOUR_QUALITY = 95
"""Quality of a JPEG from which on colour has as many pixels as brightness, for clean edges."""

TEXT_KEYWORD = "hidream"
"""Keyword of the PNG chunk with the text of an image."""

_MARK = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    "<Iptc4xmpExt:DigitalSourceType>"
    "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    "</Iptc4xmpExt:DigitalSourceType></rdf:Description></rdf:RDF></x:xmpmeta>"
    '<?xpacket end="r"?>'
)
_MAX_JPEG_EXIF_BYTES = 65_533


def encode_image(
    pixels: NDArray[np.uint8],
    output_format: OutputFormat,
    quality: int,
    *,
    has_mark: bool = False,
    text: str | None = None,
) -> bytes:
    """Encode one image; the same arguments always give the same bytes.

    Args:
        pixels: (height, width, 3), RGB.
        output_format: format of the file.
        quality: quality of JPEG and WebP, 1 to 100; PNG is lossless and ignores it.
        has_mark: whether XMP says, in IPTC's words, that a model generated the image.
        text: what else the file says, in an iTXt chunk of a PNG, or in the EXIF comment of JPEG and WebP,
            where it is ASCII. A JPEG leaves out what is longer than its 64 KiB.

    Raises:
        ValueError: the pixels are not RGB of 8 bits a channel.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"pixels must be uint8 (height, width, 3), not {pixels.dtype} {pixels.shape}")
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    xmp = _MARK.encode() if has_mark else b""
    match output_format:
        case OutputFormat.PNG:
            image.save(file, format=output_format.value, pnginfo=_png_chunks(has_mark=has_mark, text=text))
        case OutputFormat.JPEG:
            sampling = "4:4:4" if quality >= MIN_FULL_COLOUR_QUALITY else "4:2:0"
            exif = _exif(text)
            if len(exif) > _MAX_JPEG_EXIF_BYTES:
                exif = b""
            image.save(
                file, format=output_format.value, quality=quality, subsampling=sampling, xmp=xmp, exif=exif
            )
        case OutputFormat.WEBP:
            image.save(file, format=output_format.value, quality=quality, xmp=xmp, exif=_exif(text))
    return file.getvalue()


def _png_chunks(*, has_mark: bool, text: str | None) -> PngInfo:
    chunks = PngInfo()
    if has_mark:
        chunks.add_itxt("XML:com.adobe.xmp", _MARK)
    if text is not None:
        chunks.add_itxt(TEXT_KEYWORD, text)
    return chunks


def _exif(text: str | None) -> bytes:
    if text is None:
        return b""
    exif = Image.Exif()
    # The first eight bytes name the encoding.
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"ASCII\0\0\0" + text.encode("ascii")
    return exif.tobytes()
