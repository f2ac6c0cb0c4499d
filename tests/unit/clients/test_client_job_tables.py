import json
from datetime import UTC, datetime
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import code_pb2, status_pb2

from hidream.events import ImageFinished, Preview, Progress
from hidream.images import Image
from hidream.job_tables import job_table, jobs_table
from hidream.json_text import event_json_line, message_json_line
from hidream.v1 import image_pb2, job_pb2

COMMON: dict[str, Any] = {"job_id": "job-1", "sequence": 5, "time": datetime(2026, 11, 25, tzinfo=UTC)}


def job(**fields: Any) -> job_pb2.Job:
    return job_pb2.Job(
        job_id="job-1",
        create_time=Timestamp(seconds=1_764_000_000),
        spec=image_pb2.ImageSpec(
            prompt="a red\ncircle", width=64, height=48, num_inference_steps=8, guidance_scale=5, num_images=1
        ),
        **fields,
    )


def test_a_job_is_told_one_fact_a_line_and_what_it_lacks_is_left_out() -> None:
    running = job(
        state=job_pb2.JOB_STATE_RUNNING,
        stage=job_pb2.JOB_STAGE_DENOISING,
        progress=job_pb2.JobProgress(step=3, total_steps=8, step_duration=Duration(nanos=250_000_000)),
        labels={"set": "circles"},
        model="dev",
    )
    rows = dict(line.split(maxsplit=1) for line in job_table(running).splitlines())
    assert rows["state"] == "RUNNING"
    assert rows["stage"] == "DENOISING"
    assert rows["progress"] == "step 3 of 8, 250 ms a step"
    assert rows["prompt"] == "a red circle"
    assert rows["images"].startswith("64×48, 8 steps, guidance 5, seed 0, 1 image")
    assert rows["labels"] == "set=circles"
    assert rows["model"] == "dev"
    assert not {"error", "queue", "ended", "negative"} & {*rows}


def test_a_failed_job_says_why_and_a_waiting_one_where() -> None:
    failed = job(
        state=job_pb2.JOB_STATE_FAILED, error=status_pb2.Status(code=code_pb2.INTERNAL, message="a failure")
    )
    assert "error     INTERNAL: a failure" in job_table(failed)
    queued = job(state=job_pb2.JOB_STATE_QUEUED, queue_position=2, estimated_wait=Duration(seconds=4))
    assert "position 2, about 4.0 s to wait" in job_table(queued)


def test_jobs_are_one_line_each_however_long_and_broken_their_prompts() -> None:
    long = job(state=job_pb2.JOB_STATE_SUCCEEDED)
    long.spec.prompt = "many words\n" * 20
    header, line = jobs_table([long], has_header=True)
    assert header.split()[:3] == ["job", "state", "step"]
    assert line.split()[:3] == ["job-1", "SUCCEEDED", "0/8"]
    assert line.endswith("…")
    assert len(list(jobs_table([long], has_header=False))) == 1


def test_a_job_is_one_line_of_json_with_the_names_of_the_contract() -> None:
    answer = json.loads(message_json_line(job(state=job_pb2.JOB_STATE_SUCCEEDED)))
    assert answer["state"] == "JOB_STATE_SUCCEEDED"
    assert answer["spec"]["num_inference_steps"] == 8
    assert answer["images"] == []


def test_events_are_lines_of_json_without_the_bytes_of_images() -> None:
    progress = Progress(step=1, total_steps=8, step_seconds=0.5, estimated_remaining_seconds=None, **COMMON)
    assert json.loads(event_json_line(progress)) == {
        "event": "progress",
        "job_id": "job-1",
        "sequence": 5,
        "time": "2026-11-25T00:00:00+00:00",
        "step": 1,
        "total_steps": 8,
        "step_seconds": 0.5,
        "estimated_remaining_seconds": None,
    }
    image = Image(
        index=0, width=64, height=48, seed=7, mime_type="image/png", sha256=b"\xab" * 32, data=b"abc"
    )
    finished = json.loads(event_json_line(ImageFinished(image=image, **COMMON)))
    assert finished["event"] == "image_finished"
    assert finished["image"] == {
        "index": 0,
        "width": 64,
        "height": 48,
        "seed": 7,
        "mime_type": "image/png",
        "sha256": "ab" * 32,
        "size_bytes": 3,
    }
    preview = event_json_line(Preview(step=1, mime_type="image/jpeg", data=b"abc", **COMMON))
    assert "data" not in json.loads(preview)
