"""Decodes one image of a request into the bytes of a file, some slices after each step."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import numpy as np
from numpy.typing import NDArray

from hidream_grpc.devices.device import Device
from hidream_grpc.engine.protocol.messages import Admission, DecodedImage
from hidream_grpc.model.decoding.images import encode_image
from hidream_grpc.model.decoding.vae import ImageDecoding
from hidream_grpc.model.image_metadata import ImageMetadata
from hidream_grpc.model.parameters import OutputFormat


class RunningDecode:
    """The image that a rank is decoding; to give it up, drop the object.

    The decoder's slices run in the caller's thread. The file is encoded in a thread of its own, beside the
    steps that follow: Pillow releases the interpreter lock meanwhile (0.15 s for a PNG of 1024×1024).

    Args:
        admission: admission of the request.
        image_index: index of the image in the request.
        decoding: decoding of the image, not begun.
        device: where the decoder runs.
        metadata: what the file says of itself.
        clock: returns seconds from any start.
    """

    def __init__(
        self,
        admission: Admission,
        image_index: int,
        decoding: ImageDecoding,
        device: Device,
        metadata: ImageMetadata,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.admission = admission
        self._image_index = image_index
        self._decoding = decoding
        self._device = device
        self._metadata = metadata
        self._clock = clock
        self._seconds = 0.0
        self._file: Future[bytes] | None = None

    def advance(self, budget_seconds: float | None, *, waits_for_file: bool) -> DecodedImage | None:
        """Decode until the budget is spent, but at least one slice.

        Args:
            budget_seconds: time limit; the slice that exceeds it is the last one. None for no limit.
            waits_for_file: whether the rest of the budget is spent on waiting for the file.

        Returns:
            The image, or None while it is not finished.

        Raises:
            Exception: the decoder or the encoder of the file failed.
        """
        started = self._clock()
        while self._file is None:
            self._run_slice()
            if budget_seconds is not None and self._clock() - started >= budget_seconds:
                break
        spent_seconds = self._clock() - started
        self._seconds += spent_seconds
        if self._file is None:
            return None
        if budget_seconds is None:
            wait([self._file])
        elif waits_for_file:
            wait([self._file], max(0.0, budget_seconds - spent_seconds))
        return self._image(self._file.result()) if self._file.done() else None

    def _run_slice(self) -> None:
        self._decoding.advance()
        # Otherwise the next step would wait for work that this slice only started.
        self._device.synchronize()
        if self._decoding.is_finished:
            self._file = self._start_encoding(self._decoding.pixels())

    def _start_encoding(self, pixels: NDArray[np.uint8]) -> Future[bytes]:
        """Encode the image in a thread that ends afterwards."""
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="image file")
        file = executor.submit(self._encode, pixels)
        executor.shutdown(wait=False)
        return file

    def _encode(self, pixels: NDArray[np.uint8]) -> bytes:
        parameters, metadata = self.admission.parameters, self._metadata
        is_ascii = parameters.output_format is not OutputFormat.PNG
        file = encode_image(
            pixels,
            parameters.output_format,
            parameters.quality,
            has_mark=metadata.has_mark,
            text=metadata.text(parameters, self._image_index, is_ascii=is_ascii),
        )
        if metadata.signer is None:
            return file
        return metadata.signer.sign(file, parameters.output_format.mime_type)

    def _image(self, data: bytes) -> DecodedImage:
        return DecodedImage(
            claim_id=self.admission.claim_id,
            image_index=self._image_index,
            data=data,
            decode_seconds=self._seconds,
        )
