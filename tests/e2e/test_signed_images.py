"""A server with a certificate for its images: the manifests that callers receive."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from hidream.v1 import image_pb2
from tests.support.live_server import LiveServer, running_server
from tests.support.signing_certificates import SigningAuthority
from tests.support.streams import follow, request

AUTHORITY = SigningAuthority.new()


@pytest.fixture(scope="module")
def signing_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    files = AUTHORITY.issue(tmp_path_factory.mktemp("certificates"))
    flags = ("--c2pa-certificate", str(files.certificate), "--c2pa-key", str(files.key))
    with running_server(*flags, "--image-metadata", "mark") as live:
        yield live


def test_an_image_arrives_with_a_manifest_that_its_authority_vouches_for(signing_server: LiveServer) -> None:
    asked = request("a red circle", num_inference_steps=1, num_images=2)
    asked.spec.output_format = image_pb2.OUTPUT_FORMAT_WEBP
    with signing_server.stub() as stub:
        images = follow(stub.Generate(asked)).images
    assert len(images) == 2
    for image in images:
        assert AUTHORITY.verify(image, "image/webp")["validation_state"] == "Trusted"
