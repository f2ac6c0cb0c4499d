from __future__ import annotations

import io
from xml.etree import ElementTree

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import ExifTags, Image, JpegImagePlugin

from hidream_grpc.model.decoding.images import TEXT_KEYWORD, encode_image
from hidream_grpc.model.parameters import OutputFormat


@pytest.fixture
def pixels() -> NDArray[np.uint8]:
    rows, columns = np.mgrid[0:48, 0:80]
    return np.stack([rows * 5, columns * 3, 255 - rows * 2 - columns], axis=-1).astype(np.uint8)


def decode(data: bytes, output_format: OutputFormat) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == output_format.value
        assert Image.MIME[output_format.value] == output_format.mime_type
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("output_format", OutputFormat)
def test_a_file_has_the_format_and_the_size_asked_for(
    output_format: OutputFormat, pixels: NDArray[np.uint8]
) -> None:
    decoded = decode(encode_image(pixels, output_format, quality=95), output_format)
    assert decoded.shape == (48, 80, 3)
    assert np.abs(decoded.astype(int) - pixels).mean() < 4


def test_png_loses_nothing(pixels: NDArray[np.uint8]) -> None:
    assert np.array_equal(decode(encode_image(pixels, OutputFormat.PNG, 1), OutputFormat.PNG), pixels)


@pytest.mark.parametrize("output_format", OutputFormat)
def test_the_same_pixels_are_the_same_bytes(output_format: OutputFormat, pixels: NDArray[np.uint8]) -> None:
    assert encode_image(pixels, output_format, 90) == encode_image(pixels.copy(), output_format, 90)


@pytest.mark.parametrize("output_format", OutputFormat)
def test_a_marked_file_says_in_xmp_that_a_model_generated_it(
    output_format: OutputFormat, pixels: NDArray[np.uint8]
) -> None:
    data = encode_image(pixels, output_format, 90, has_mark=True)
    assert data == encode_image(pixels, output_format, 90, has_mark=True)
    with Image.open(io.BytesIO(data)) as image:
        xmp = image.info["xmp"]
    # As any reader of XML sees it.
    [source] = ElementTree.fromstring(xmp).iter(
        "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
    )
    assert source.text == "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    unmarked = encode_image(pixels, output_format, 90)
    assert np.array_equal(decode(data, output_format), decode(unmarked, output_format))
    assert b"xmp" not in unmarked.lower()
    assert b"Exif" not in unmarked


def test_a_png_carries_its_text_in_any_script(pixels: NDArray[np.uint8]) -> None:
    data = encode_image(pixels, OutputFormat.PNG, 90, text='{"prompt": "红色"}')
    with Image.open(io.BytesIO(data)) as image:
        assert image.info[TEXT_KEYWORD] == '{"prompt": "红色"}'


def comment(data: bytes) -> bytes | None:
    with Image.open(io.BytesIO(data)) as image:
        return image.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)


@pytest.mark.parametrize("output_format", [OutputFormat.JPEG, OutputFormat.WEBP])
def test_other_files_carry_their_text_in_the_exif_comment(
    output_format: OutputFormat, pixels: NDArray[np.uint8]
) -> None:
    assert comment(encode_image(pixels, output_format, 90, text="a fox")) == b"ASCII\0\0\0a fox"


def test_a_jpeg_leaves_out_a_text_that_it_cannot_hold_and_keeps_the_mark(pixels: NDArray[np.uint8]) -> None:
    data = encode_image(pixels, OutputFormat.JPEG, 90, has_mark=True, text="a" * 65_536)
    assert comment(data) is None
    assert b"trainedAlgorithmicMedia" in data
    assert comment(encode_image(pixels, OutputFormat.JPEG, 90, text="a" * 65_400)) is not None
    assert comment(encode_image(pixels, OutputFormat.WEBP, 90, text="a" * 65_536)) is not None


@pytest.mark.parametrize("output_format", [OutputFormat.JPEG, OutputFormat.WEBP])
def test_lower_quality_makes_smaller_files(output_format: OutputFormat, pixels: NDArray[np.uint8]) -> None:
    sizes = [len(encode_image(pixels, output_format, quality)) for quality in (1, 50, 100)]
    assert sizes == sorted(set(sizes))


@pytest.mark.parametrize(("quality", "has_full_colour"), [(90, False), (94, False), (95, True), (100, True)])
def test_a_jpeg_keeps_coloured_edges_sharp_from_quality_95_on(quality: int, has_full_colour: bool) -> None:
    # Stripes one pixel wide, of two colours that are about as bright.
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, 0::2] = (255, 0, 0)
    stripes[:, 1::2] = (0, 100, 255)
    data = encode_image(stripes, OutputFormat.JPEG, quality)
    with Image.open(io.BytesIO(data)) as image:
        assert JpegImagePlugin.get_sampling(image) == (0 if has_full_colour else 2), "4:4:4, or 4:2:0"
    is_sharp = np.abs(decode(data, OutputFormat.JPEG).astype(int) - stripes).max() < 16
    assert is_sharp is np.bool_(has_full_colour)


@pytest.mark.parametrize("output_format", [OutputFormat.JPEG, OutputFormat.WEBP])
def test_the_longest_side_of_a_format_can_be_written_and_a_longer_one_cannot(
    output_format: OutputFormat,
) -> None:
    longest = output_format.max_side_pixels
    assert longest is not None
    for shape in ((1, longest, 3), (longest, 1, 3)):
        assert (
            decode(encode_image(np.zeros(shape, np.uint8), output_format, 90), output_format).shape == shape
        )
    with pytest.raises((OSError, ValueError)):
        encode_image(np.zeros((1, longest + 1, 3), np.uint8), output_format, 90)


def test_pixels_of_another_kind_are_refused(pixels: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match="uint8"):
        encode_image(pixels.astype(np.float32), OutputFormat.PNG, 90)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="height, width, 3"):
        encode_image(pixels[..., 0], OutputFormat.PNG, 90)
