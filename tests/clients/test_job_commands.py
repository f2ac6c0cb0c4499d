"""`hidream submit|batch|status|list|watch|cancel|delete|download` against the live service."""

from __future__ import annotations

import hashlib
import json
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from hidream.client import Client
from hidream.downloads import part_path
from tests.clients.test_hidream_command import HIDREAM, PROMPT, SMALL, hidream, text_until
from tests.support.live_server import LiveServer, running_server, wait_until
from tests.support.unused_ports import unused_port

LONG = ("--size", "64x64", "--steps", "150", "--images", "4")


@pytest.fixture
def label() -> str:
    """A label that no other test uses, since they share one server."""
    return f"test={uuid.uuid4().hex}"


def answer(address: str, *arguments: str, folder: Path | None = None) -> str:
    """What a command that works prints."""
    result = hidream(address, *arguments, folder=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout.removesuffix("\n")


def submitted(server: LiveServer, *options: str) -> str:
    return answer(server.address, "submit", PROMPT, "--seed", "7", *options)


@pytest.fixture
def long_job(server: LiveServer) -> Iterator[str]:
    """A job that is still there when the test looks, and is stopped after it."""
    job_id = submitted(server, *LONG)
    yield job_id
    hidream(server.address, "cancel", job_id)


@pytest.fixture
def drawn_job(server: LiveServer) -> str:
    """A job that has drawn two images."""
    job_id = submitted(server, *SMALL, "--images", "2")
    assert answer(server.address, "watch", job_id, "--quiet") == "SUCCEEDED"
    return job_id


def test_submit_prints_the_id_under_which_status_finds_the_job(server: LiveServer, label: str) -> None:
    job_id = submitted(server, *SMALL, "--label", label, "--priority", "high")
    rows = dict(line.split(maxsplit=1) for line in answer(server.address, "status", job_id).splitlines())
    assert rows["job"] == job_id
    assert rows["prompt"] == PROMPT
    assert rows["images"].startswith("64×64, 3 steps")
    assert rows["labels"] == label
    assert rows["priority"] == "HIGH"


def test_a_job_as_json_has_the_names_of_the_contract(server: LiveServer) -> None:
    job = json.loads(answer(server.address, "submit", PROMPT, *SMALL, "--json"))
    assert job["state"] in ("JOB_STATE_QUEUED", "JOB_STATE_RUNNING")
    found = json.loads(answer(server.address, "status", job["job_id"], "--json"))
    assert found["spec"] == job["spec"]


def test_the_same_request_id_is_the_same_job_and_another_request_is_refused(server: LiveServer) -> None:
    request_id = uuid.uuid4().hex
    job_id = submitted(server, *SMALL, "--request-id", request_id)
    assert submitted(server, *SMALL, "--request-id", request_id) == job_id
    refused = hidream(server.address, "submit", "another", *SMALL, "--request-id", request_id)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert request_id in refused.stderr


def test_every_wrong_option_of_submit_has_its_line(server: LiveServer) -> None:
    result = hidream(server.address, "submit", "", "--steps", "0", "--label", f"{'k' * 999}=v")
    assert result.returncode == 2
    flags = {line.split()[1] for line in result.stderr.splitlines()}
    assert {"PROMPT", "--steps"} <= flags


def batch_line(seed: int, label: str, **fields: Any) -> str:
    key, value = label.split("=")
    size = {"width": 64, "height": 64, "num_inference_steps": 2}
    return json.dumps({"prompt": PROMPT, "seed": seed, "labels": {key: value}, **size, **fields})


def run_batch(server: LiveServer, text: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return hidream(server.address, "batch", *arguments, stdin=text)


def test_a_batch_from_a_file_becomes_jobs_in_the_order_of_its_lines(
    server: LiveServer, label: str, tmp_path: Path
) -> None:
    (tmp_path / "jobs.jsonl").write_text("\n".join(batch_line(seed, label) for seed in (3, 1, 2)))
    lines = answer(server.address, "batch", "jobs.jsonl", "--json", folder=tmp_path).splitlines()
    assert [json.loads(line)["spec"]["seed"] for line in lines] == ["3", "1", "2"]
    listed = answer(server.address, "list", "--label", label, "--json").splitlines()
    assert {json.loads(line)["job_id"] for line in listed} == {json.loads(line)["job_id"] for line in lines}


@pytest.mark.parametrize(
    ("bad_line", "says"),
    [
        pytest.param('{"prompt": "a", "steps": 2}', "line 3, steps: there is no such field", id="no field"),
        pytest.param('{"prompt": "a", "width": 65, "height": 64}', "line 3, width: ", id="a limit"),
    ],
)
def test_a_bad_line_of_a_batch_is_named_and_nothing_is_accepted(
    bad_line: str, says: str, server: LiveServer, label: str
) -> None:
    text = "\n".join([batch_line(1, label), "", bad_line, batch_line(2, label)])
    result = run_batch(server, text)
    assert (result.returncode, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line.startswith(f"hidream: {says}")
    assert answer(server.address, "list", "--label", label, "--json") == ""


def test_a_list_goes_page_by_page_newest_first(server: LiveServer, label: str) -> None:
    text = "\n".join(batch_line(seed, label) for seed in range(3))
    job_ids = run_batch(server, text).stdout.split()
    first = hidream(server.address, "list", "--label", label, "--page-size", "2", "--json")
    assert len(first.stdout.splitlines()) == 2
    token = first.stderr.split("--page-token ")[1].strip()
    # A token stays valid while jobs come.
    run_batch(server, batch_line(9, label))
    second = hidream(server.address, "list", "--label", label, "--page-token", token, "--json")
    pages = [json.loads(line)["job_id"] for line in (first.stdout + second.stdout).splitlines()]
    assert sorted(pages) == sorted(job_ids)
    assert second.stderr == ""
    header, *rows = answer(server.address, "list", "--label", label, "--all", "--page-size", "1").splitlines()
    assert header.split()[:2] == ["job", "state"]
    assert len(rows) == 4


def test_a_list_of_a_state_holds_only_jobs_in_it(server: LiveServer, drawn_job: str, long_job: str) -> None:
    def listed(*states: str) -> list[str]:
        options = [option for state in states for option in ("--state", state)]
        lines = answer(server.address, "list", *options, "--all", "--json").splitlines()
        return [json.loads(line)["job_id"] for line in lines]

    assert drawn_job in listed("succeeded")
    assert long_job not in listed("succeeded")
    assert long_job in listed("queued", "running")


def test_watch_shows_the_steps_and_writes_what_download_writes(server: LiveServer, tmp_path: Path) -> None:
    job_id = submitted(server, *SMALL, "--images", "2")
    watched = hidream(server.address, "watch", job_id, "--out", "watched_{index}.png", folder=tmp_path)
    assert (watched.returncode, watched.stdout) == (0, "watched_0.png\nwatched_1.png\n")
    assert "seed 7, 64×64, 3 steps" in watched.stderr.splitlines()[-1]
    downloaded = answer(server.address, "download", job_id, "--out", "{index}.png", folder=tmp_path)
    assert downloaded.splitlines() == ["0.png", "1.png"]
    for index in range(2):
        data = (tmp_path / f"{index}.png").read_bytes()
        assert data == (tmp_path / f"watched_{index}.png").read_bytes()
    with PIL.Image.open(tmp_path / "0.png") as picture:
        assert (picture.size, picture.format) == ((64, 64), "PNG")


def test_a_download_goes_on_where_an_earlier_one_broke_off(
    server: LiveServer, drawn_job: str, tmp_path: Path
) -> None:
    info = json.loads(
        answer(
            server.address, "download", drawn_job, "--index", "1", "--out", "1.png", "--json", folder=tmp_path
        )
    )
    # One image of several, named without a pattern, has its index behind the name.
    path = tmp_path / "1_1.png"
    whole = path.read_bytes()
    assert (len(whole), info["index"]) == (int(info["size_bytes"]), 1)
    path.unlink()
    part = part_path(path, drawn_job, 1)
    part.write_bytes(whole[: len(whole) // 2])
    assert (
        answer(server.address, "download", drawn_job, "--index", "1", "--out", "1.png", folder=tmp_path)
        == "1_1.png"
    )
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(whole).digest()
    assert list(tmp_path.iterdir()) == [path]


def test_every_image_that_was_asked_for_is_downloaded_or_missed(
    server: LiveServer, drawn_job: str, tmp_path: Path
) -> None:
    result = hidream(server.address, "download", drawn_job, "--index", "1", "--index", "2", folder=tmp_path)
    assert (result.returncode, result.stdout) == (1, "hidream_8.png\n")
    assert "image 2" in result.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["hidream_8.png"]


def test_an_image_that_is_not_finished_is_not_downloaded(
    server: LiveServer, long_job: str, tmp_path: Path
) -> None:
    result = hidream(server.address, "download", long_job, folder=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert not list(tmp_path.iterdir())


def test_a_job_that_runs_is_cancelled_before_it_is_deleted(server: LiveServer, long_job: str) -> None:
    refused = hidream(server.address, "delete", long_job)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert answer(server.address, "cancel", long_job).split()[0] == long_job
    with Client(server.address) as client:
        wait_until(lambda: client.status(long_job).HasField("end_time"), 30, "the job has ended")
    assert answer(server.address, "cancel", long_job) == f"{long_job} CANCELLED"
    assert answer(server.address, "delete", long_job) == long_job
    gone = hidream(server.address, "status", long_job)
    assert gone.returncode == 1
    assert long_job in gone.stderr


def test_watching_a_cancelled_job_ends_with_exit_code_1(server: LiveServer, long_job: str) -> None:
    answer(server.address, "cancel", long_job)
    watched = hidream(server.address, "watch", long_job, "--quiet")
    assert (watched.returncode, watched.stdout) == (1, "")
    assert "the job was cancelled: CANCEL_REASON_REQUESTED" in watched.stderr


def test_watching_all_jobs_tells_the_states_of_a_new_one_in_order(server: LiveServer, label: str) -> None:
    command = [str(HIDREAM), "watch", "--label", label, "--json", "--address", server.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            job_id = submitted(server, *SMALL, "--label", label)
            assert process.stdout is not None
            states = []
            for line in process.stdout:
                change = json.loads(line)
                assert change["job_id"] == job_id
                states.append(change["state"].removeprefix("JOB_STATE_"))
                if states[-1] == "SUCCEEDED":
                    break
        finally:
            process.kill()
    # A state that it has left before it could be told is passed over.
    assert states == [state for state in ("QUEUED", "RUNNING", "SUCCEEDED") if state in states]


@pytest.mark.parametrize("command", ["status", "watch", "cancel", "delete", "download"])
def test_a_job_that_is_not_there_is_one_line_and_exit_code_1(
    command: str, server: LiveServer, tmp_path: Path
) -> None:
    result = hidream(server.address, command, "no-such-job", folder=tmp_path)
    assert (result.returncode, result.stdout) == (1, "")
    assert "no-such-job" in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["submit", "status", "watch", "cancel", "delete", "download"])
def test_where_nobody_listens_every_command_exits_3(
    command: str, closed_address: str, tmp_path: Path
) -> None:
    result = hidream(closed_address, command, "a", folder=tmp_path)
    assert result.returncode == 3
    assert f"hidream: {closed_address}: " in result.stderr.splitlines()[-1]


def begun(address: str, *arguments: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [HIDREAM, *arguments, "--address", address],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_watch_and_a_generation_survive_a_kill_of_the_server_and_go_on_behind_the_last_event(
    tmp_path: Path,
) -> None:
    address = f"127.0.0.1:{unused_port()}"
    flags = ("--data-dir", str(tmp_path / "data"), "--grace-seconds", "0", "--listen", address)
    out = tmp_path / "out"
    out.mkdir()
    with ExitStack() as ended:
        with running_server(*flags) as server:
            job_id = submitted(server, "--size", "64x64", "--steps", "60", "--images", "2")
            for_people = ended.enter_context(begun(address, "watch", job_id, "--out", "a.png", folder=out))
            for_programs = ended.enter_context(begun(address, "watch", job_id, "--json", folder=out))
            generating = ended.enter_context(
                begun(
                    address,
                    *("generate", PROMPT, "--size", "64x64", "--steps", "60", "--out", "b.png", "--json"),
                    folder=out,
                )
            )
            ended.callback(for_people.kill)
            ended.callback(generating.kill)
            ended.callback(for_programs.kill)
            text_until(for_people.stderr, r"step \d+ of 60")
            told_before = text_until(for_programs.stdout, r'"step": \d+.*\n')
            generated_before = text_until(generating.stdout, r'"step": \d+.*\n')
            server.process.kill()
            server.process.wait()
        with running_server(*flags):
            paths, shown = for_people.communicate(timeout=120)
            told_after, errors = for_programs.communicate(timeout=120)
            generated_after, generation_errors = generating.communicate(timeout=120)
    assert (for_people.returncode, paths) == (0, "a_0.png\na_1.png\n"), shown
    assert "connection lost, trying again" in shown
    assert "attempt 2: the server that ran it ended; goes on after step" in shown
    assert sorted(file.name for file in out.iterdir()) == ["a_0.png", "a_1.png", "b.png"]

    assert (generating.returncode, generation_errors) == (0, "")
    generated = [json.loads(line) for line in (generated_before + generated_after).splitlines()]
    assert len({event["job_id"] for event in generated}) == 1
    sequences = [event["sequence"] for event in generated]
    assert sequences == sorted(set(sequences))
    assert [event["event"] for event in generated].count("restarted") == 1
    assert [event["event"] for event in generated[-2:]] == ["image_finished", "succeeded"]

    assert (for_programs.returncode, errors) == (0, "")
    events = [json.loads(line) for line in (told_before + told_after).splitlines()]
    sequences = [event["sequence"] for event in events]
    assert sequences == sorted(set(sequences))
    kinds = [event["event"] for event in events]
    assert kinds[-3:] == ["image_finished", "image_finished", "succeeded"]
    assert kinds.count("restarted") == 1
    restarted = events[kinds.index("restarted")]
    assert (restarted["attempt"], restarted["reason"]) == (2, "the server that ran it ended")
    steps = [event["step"] for event in events[kinds.index("restarted") :] if event["event"] == "progress"]
    assert steps[0] > restarted["resumed_from_step"]
    assert steps[-1] == 60
    for event in events[-3:-1]:
        data = (out / f"a_{event['image']['index']}.png").read_bytes()
        assert hashlib.sha256(data).hexdigest() == event["image"]["sha256"]
