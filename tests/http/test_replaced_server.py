from __future__ import annotations

import json
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from hidream.client import Client
from tests.support.live_bridge import LiveBridge
from tests.support.live_server import LiveServer, wait_until

LONG: dict[str, Any] = {"width": 512, "height": 512, "num_inference_steps": 150}
SECONDS = 300


def curl(*arguments: str) -> bytes:
    """What curl prints for these arguments; it fails where the server answers with an error."""
    command = ["curl", "--silent", "--show-error", "--fail-with-body", "--noproxy", "*", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=SECONDS).stdout


def post(url: str, body: object) -> Any:
    header = ("-H", "Content-Type: application/json")
    return json.loads(curl("-X", "POST", url, *header, "-d", json.dumps(body)))


@pytest.fixture
def client(server: LiveServer) -> Any:
    with Client(server.address) as client:
        yield client


@pytest.fixture
def long_task(client: Client) -> Any:
    """A task that does not end while a test runs."""
    job = client.submit("a red circle", **LONG)
    yield job.job_id
    client.cancel(job)


@pytest.mark.parametrize(
    ("resolution", "steps", "few_steps"),
    [
        pytest.param("128x128", 4, 1, id="small"),
        pytest.param("1024x1024", 5, 1, id="of the size as written", marks=pytest.mark.long),
    ],
)
def test_every_curl_for_the_replaced_server_works_here(
    bridge: LiveBridge, client: Client, tmp_path: Path, resolution: str, steps: int, few_steps: int
) -> None:
    asked = {"resolution": resolution, "num_inference_steps": steps, "num_images_per_prompt": 1}
    submitted = post(f"{bridge.url}/submit", {"prompt": "a red circle", "seed": 5, **asked})
    assert_submitted(submitted)
    batch = post(
        f"{bridge.url}/batch_submit",
        {"requests": [{"prompt": "a blue square", **asked}, {"prompt": "a green triangle", **asked}]},
    )
    for task in batch:
        assert_submitted(task)
    seen = [completed(bridge, task["task_id"]) for task in (submitted, *batch)]
    path, same = tmp_path / "result.png", tmp_path / "same.png"
    curl(f"{bridge.url}/download/{submitted['task_id']}?image_index=0", "-o", str(path))
    client.download(submitted["task_id"], same)
    assert path.read_bytes() == same.read_bytes() == curl(seen[0]["result_urls"][0])

    health = json.loads(curl(f"{bridge.url}/health"))
    assert {name: type(value) for name, value in health.items()} == {
        "status": str,
        "pipeline_ready": bool,
        "queue_length": int,
        "active_tasks": int,
        "total_tasks": int,
    }
    assert (health["status"], health["pipeline_ready"]) == ("healthy", True)
    assert json.loads(curl(f"{bridge.url}/"))["status"] == "running"

    # Without a size it is the server's; these are not waited for.
    more = [
        post(f"{bridge.url}/submit", {"prompt": f"test {i}", "num_inference_steps": few_steps}) for i in "12"
    ]
    for task in more:
        assert_submitted(task)
        client.cancel(task["task_id"])


def completed(bridge: LiveBridge, task_id: str) -> dict[str, Any]:
    """The task once it is completed."""
    shown: list[dict[str, Any]] = []

    def is_completed() -> bool:
        shown.append(json.loads(curl(f"{bridge.url}/status/{task_id}")))
        assert shown[-1]["status"] in ("queued", "processing", "completed")
        return bool(shown[-1]["status"] == "completed")

    wait_until(is_completed, SECONDS, "the task is completed")
    progress = [task["progress"] for task in shown]
    assert progress == sorted(progress)
    assert_completed(shown[-1], task_id)
    return shown[-1]


def assert_submitted(answer: dict[str, Any]) -> None:
    assert set(answer) == {"task_id", "status", "estimated_time", "message"}
    assert isinstance(answer["task_id"], str)
    assert answer["status"] in ("queued", "processing")
    # A server that has not measured a step cannot tell.
    assert answer["estimated_time"] is None or answer["estimated_time"] >= 0
    assert isinstance(answer["message"], str)


def assert_completed(answer: dict[str, Any], task_id: str) -> None:
    assert (answer["task_id"], answer["progress"], answer["estimated_time"]) == (task_id, 100, 0)
    assert all(isinstance(url, str) for url in answer["result_urls"])
    assert answer["processing_time"] > 0
    created, completed = map(datetime.fromisoformat, (answer["created_at"], answer["completed_at"]))
    assert created < completed
    assert isinstance(answer["message"], str)


def test_a_task_that_runs_says_how_far_it_is(http: httpx.Client, long_task: str) -> None:
    shown: list[dict[str, Any]] = []

    def is_under_way() -> bool:
        shown.append(http.get(f"/status/{long_task}").json())
        return bool(shown[-1]["progress"] >= 1)

    wait_until(is_under_way, SECONDS, "a hundredth of its steps has ended")
    assert (shown[-1]["status"], shown[-1]["result_urls"]) == ("processing", [])
    assert shown[-1]["estimated_time"] > 0
    assert (shown[-1]["completed_at"], shown[-1]["processing_time"]) == (None, None)
    progress = [task["progress"] for task in shown]
    assert progress == sorted(progress)
    refused = http.get(f"/download/{long_task}")
    assert (refused.status_code, refused.json()) == (400, {"detail": "Task not completed"})


def test_what_a_task_asks_for_is_what_is_drawn(http: httpx.Client, client: Client) -> None:
    asked = {"resolution": "128x64", "num_inference_steps": 2, "num_images_per_prompt": 2, "seed": 5}
    guided = {"negative_prompt": "a blue square", "guidance_scale": 2.5}
    task = http.post("/submit", json={"prompt": "a red circle", **asked, **guided}).json()
    job = client.wait(task["task_id"])
    assert (job.spec.width, job.spec.height, job.spec.num_inference_steps) == (128, 64, 2)
    assert (job.spec.negative_prompt, job.spec.guidance_scale) == ("a blue square", 2.5)
    assert [image.seed for image in job.images] == [5, 6]
    urls = http.get(f"/status/{job.job_id}", headers={"X-Forwarded-Proto": "https"}).json()["result_urls"]
    assert urls == [f"https://{http.base_url.netloc.decode()}/images/{job.job_id}/{i}.png" for i in (0, 1)]


def test_a_cancelled_task_says_so(http: httpx.Client, client: Client) -> None:
    job = client.submit("a red circle", **LONG)
    client.cancel(job)
    wait_until(lambda: client.status(job).HasField("end_time"), SECONDS, "the job has ended")
    task = http.get(f"/status/{job.job_id}").json()
    assert (task["status"], task["estimated_time"], task["result_urls"]) == ("cancelled", None, [])
    assert "cancel" in task["message"]


def test_unknown_tasks_and_images_are_404(http: httpx.Client, client: Client) -> None:
    job = client.submit("a red circle", width=64, height=64, num_inference_steps=1, output_format="JPEG")
    client.wait(job)
    for path, detail in (
        ("/status/nothing", "Task not found"),
        ("/download/nothing", "Task not found"),
        (f"/download/{job.job_id}?image_index=1", "Image not found"),
    ):
        refused = http.get(path)
        assert (refused.status_code, refused.json()) == (404, {"detail": detail})
    for name in ("0.png", "1.jpeg", "0", "x.png", "99999999999999999999.png"):
        assert http.get(f"/images/{job.job_id}/{name}").status_code == 404
    image = http.get(f"/images/{job.job_id}/0.jpeg")
    assert image.headers["content-type"] == "image/jpeg"
    assert http.head(f"/images/{job.job_id}/0.jpeg").headers["etag"] == image.headers["etag"]
    assert http.get(f"/download/{job.job_id}?image=1").json()["detail"][0]["loc"] == ["query", "image"]


REFUSED: list[tuple[dict[str, Any], list[Any]]] = [
    ({}, ["body", "prompt"]),
    ({"prompt": "a", "sed": 1}, ["body", "sed"]),
    ({"prompt": "a", "resolution": "1024"}, ["body", "resolution"]),
    ({"prompt": "a", "resolution": "1001x1001"}, ["body", "resolution"]),
    ({"prompt": "a", "num_inference_steps": 0}, ["body", "num_inference_steps"]),
    ({"prompt": "a", "num_inference_steps": "many"}, ["body", "num_inference_steps"]),
    ({"prompt": "a", "num_images_per_prompt": 10_000}, ["body", "num_images_per_prompt"]),
    ({"prompt": "a", "seed": -1}, ["body", "seed"]),
    ({"prompt": "a", "seed": 2**70}, ["body", "seed"]),
    ({"prompt": "a", "guidance_scale": -1}, ["body", "guidance_scale"]),
    ({"prompt": "a", "negative_prompt": "b", "guidance_scale": 1}, ["body", "negative_prompt"]),
]


@pytest.mark.parametrize(("body", "place"), REFUSED, ids=lambda value: json.dumps(value)[:40])
def test_an_unknown_field_or_value_is_422_with_its_name(
    http: httpx.Client, body: dict[str, Any], place: list[Any]
) -> None:
    refused = http.post("/submit", json=body)
    assert refused.status_code == 422
    assert [error["loc"] for error in refused.json()["detail"]] == [place]
    assert all(error["msg"] and error["type"] for error in refused.json()["detail"])
    batch = http.post("/batch_submit", json={"requests": [{"prompt": "a"}, body]})
    assert batch.status_code == 422
    assert [error["loc"] for error in batch.json()["detail"]] == [["body", "requests", 1, *place[1:]]]


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/health?x=1", "x"),
        ("/status/nothing?x=1", "x"),
        ("/images/nothing/0.png?x=1", "x"),
        ("/download/nothing?image_index=0&image_index=1", "image_index"),
    ],
)
def test_no_query_parameter_is_dropped(path: str, name: str, http: httpx.Client) -> None:
    refused = http.get(path)
    assert refused.status_code == 422
    assert [error["loc"] for error in refused.json()["detail"]] == [["query", name]]


def test_what_is_no_json_is_refused(http: httpx.Client) -> None:
    json_type = {"Content-Type": "application/json"}
    for content in (b"{", b"\xff", b"[]"):
        refused = http.post("/submit", content=content, headers=json_type)
        assert (refused.status_code, refused.json()["detail"][0]["loc"][0]) == (422, "body")
    refused = http.post("/submit?seed=1", json={"prompt": "a"})
    assert (refused.status_code, refused.json()["detail"][0]["loc"]) == (422, ["query", "seed"])
    refused = http.post("/submit", content=b'{"prompt": "a"}', headers={"Content-Type": "text/plain"})
    assert (refused.status_code, list(refused.json())) == (415, ["detail"])
