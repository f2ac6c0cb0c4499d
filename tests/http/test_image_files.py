"""Images as files of HTTP."""

from __future__ import annotations

import hashlib

import httpx
import pytest

from hidream.v1 import image_pb2
from tests.support.job_calls import Stub, cancel, downloaded, drawn, running
from tests.support.live_server import LiveServer

pytestmark = pytest.mark.usefixtures("http")


@pytest.fixture(scope="module")
def image(server: LiveServer) -> tuple[str, image_pb2.ImageInfo, bytes]:
    """The path, description and bytes of one image."""
    with server.stub() as stub:
        job = drawn(stub, prompt="a red circle", width=128, height=128)
        return f"/v1/jobs/{job.job_id}/images/0", job.images[0], downloaded(stub, job.job_id)


Image = tuple[str, image_pb2.ImageInfo, bytes]


def test_an_image_is_a_file_with_its_type_size_and_digest(http: httpx.Client, image: Image) -> None:
    path, info, content = image
    answer = http.get(path)
    assert (answer.status_code, answer.content) == (200, content)
    assert answer.headers["content-type"] == "image/png"
    assert int(answer.headers["content-length"]) == info.size_bytes
    assert answer.headers["etag"] == f'"{hashlib.sha256(content).hexdigest()}"'
    head = http.head(path)
    assert (head.status_code, head.content, head.headers["content-length"]) == (
        200,
        b"",
        str(info.size_bytes),
    )


def test_an_image_that_is_known_is_not_sent_again(http: httpx.Client, image: Image) -> None:
    path, info, _ = image
    etag = f'"{info.sha256.hex()}"'
    for condition in (etag, f'"other", W/{etag}', "*"):
        same = http.get(path, headers={"If-None-Match": condition})
        assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", etag)
    assert http.get(path, headers={"If-None-Match": '"other"'}).status_code == 200


def test_a_download_goes_on_from_where_it_was(http: httpx.Client, image: Image) -> None:
    path, info, content = image
    size = len(content)
    etag = f'"{info.sha256.hex()}"'
    for asked, start, stop in (
        ("bytes=0-0", 0, 1),
        ("bytes=0-", 0, size),
        (f"bytes={size // 2}-", size // 2, size),
        (f"bytes=10-{size * 2}", 10, size),
        ("bytes=-7", size - 7, size),
        (f"bytes=-{size * 2}", 0, size),
    ):
        part = http.get(path, headers={"Range": asked, "If-Range": etag})
        assert (part.status_code, part.content) == (206, content[start:stop])
        assert part.headers["content-range"] == f"bytes {start}-{stop - 1}/{size}"
    whole = http.get(path, headers={"Range": "bytes=1-2", "If-Range": '"other"'})
    assert (whole.status_code, whole.content) == (200, content)
    # Several ranges at once may be answered by the whole.
    assert http.get(path, headers={"Range": "bytes=0-1,4-5"}).status_code == 200


def test_a_range_outside_of_the_image_is_refused_with_its_size(http: httpx.Client, image: Image) -> None:
    path, info, _ = image
    for asked in (f"bytes={info.size_bytes}-", "bytes=-0"):
        refused = http.get(path, headers={"Range": asked})
        assert refused.status_code == 416
        assert refused.headers["content-range"] == f"bytes */{info.size_bytes}"
        assert refused.headers["content-type"] == "application/problem+json"


def test_an_image_that_is_not_there_is_a_problem(http: httpx.Client, image: Image, stub: Stub) -> None:
    path, _, _ = image
    assert http.get(path[:-1] + "7").status_code == 404
    for wrong, field in (("x", "image_index"), ("-1", "image_index"), ("0?offset=3", "offset")):
        refused = http.get(path[:-1] + wrong)
        assert refused.status_code == 400
        assert [one["field"] for one in refused.json()["violations"]] == [field]
    job_id = running(stub)
    unfinished = http.get(f"/v1/jobs/{job_id}/images/0")
    cancel(stub, job_id)
    assert (unfinished.status_code, unfinished.json()["code"]) == (400, "FAILED_PRECONDITION")
