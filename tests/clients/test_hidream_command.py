from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import termios
import uuid
from contextlib import chdir, suppress
from pathlib import Path
from typing import IO

import PIL.Image
import pytest
from typer.testing import CliRunner

from hidream.client import Client
from hidream.commands import app
from hidream.v1 import job_pb2
from tests.clients.conftest import HealthOnlyServer
from tests.failure.tcp_proxy import running_proxy
from tests.support.live_server import LiveServer, wait_until

HIDREAM = Path(sys.executable).parent / "hidream"
PROMPT = "a red circle on a blue background"
SMALL = ("--size", "64x64", "--steps", "3")


def hidream(
    address: str, *arguments: str, folder: Path | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    """The command as a shell runs it, but in this process, which starts no interpreter for it."""
    with chdir(folder or Path()):
        command = [*arguments, "--address", address]
        result = CliRunner().invoke(app, command, input=stdin, catch_exceptions=False)
    return subprocess.CompletedProcess(command, result.exit_code, result.stdout, result.stderr)


def test_generate_writes_the_image_and_shows_every_step(server: LiveServer, tmp_path: Path) -> None:
    result = hidream(server.address, "generate", PROMPT, "--seed", "7", *SMALL, folder=tmp_path)
    assert (result.returncode, result.stdout) == (0, "hidream_7.png\n")
    for step in range(1, 4):
        assert f"step {step} of 3" in result.stderr
    assert "seed 7, 64×64, 3 steps" in result.stderr.splitlines()[-1]
    assert [file.name for file in tmp_path.iterdir()] == ["hidream_7.png"]
    with PIL.Image.open(tmp_path / "hidream_7.png") as picture:
        picture.load()
        assert (picture.size, picture.format) == ((64, 64), "PNG")


def test_generate_draws_an_image_again_and_says_whether_the_bytes_are_the_same(
    server: LiveServer, tmp_path: Path
) -> None:
    first = (
        "generate",
        PROMPT,
        "--seed",
        "7",
        *SMALL,
        "--guidance",
        "3.3",
        "--out",
        "fox.jpeg",
        "--quality",
        "70",
    )
    assert hidream(server.address, *first, folder=tmp_path).returncode == 0
    again = hidream(server.address, "generate", "--like", "fox.jpeg", "--out", "new", folder=tmp_path)
    assert (again.returncode, again.stdout) == (0, "new\n")
    assert again.stderr.splitlines()[-1] == "hidream: the same bytes as fox.jpeg"
    assert (tmp_path / "new").read_bytes() == (tmp_path / "fox.jpeg").read_bytes()
    varied = ("generate", "--like", "fox.jpeg", "--seed", "8", "--out", "varied.png")
    other = hidream(server.address, *varied, folder=tmp_path)
    assert other.returncode == 0
    assert "not the same bytes as fox.jpeg: pixels differ by" in other.stderr.splitlines()[-1]


def test_generate_with_every_option_writes_what_was_asked_for(server: LiveServer, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    result = hidream(
        server.address,
        *("generate", PROMPT, "--seed", "7", *SMALL, "--guidance", "2", "--negative", "green"),
        *("--images", "2", "--out", "new/circle_{index}.webp", "--quality", "60"),
        *("--timeout", "120", "--quiet", "--preview"),
        folder=tmp_path,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == ["new/circle_0.webp", "new/circle_1.webp"]
    formats = {}
    for file in (tmp_path / "new").iterdir():
        with PIL.Image.open(file) as picture:
            formats[file.name] = picture.format
    assert formats == {"circle_0.webp": "WEBP", "circle_1.webp": "WEBP", "circle_0.preview.jpg": "JPEG"}


def test_the_same_seed_draws_the_same_file(server: LiveServer, tmp_path: Path) -> None:
    for name in ("first.png", "second.png"):
        result = hidream(
            server.address, "generate", PROMPT, "--seed", "9", *SMALL, "--out", name, folder=tmp_path
        )
        assert result.returncode == 0
    assert (tmp_path / "first.png").read_bytes() == (tmp_path / "second.png").read_bytes()


def test_out_is_stdout_or_whatever_is_there_and_replaces_no_device(
    server: LiveServer, tmp_path: Path
) -> None:
    generate, where = ("generate", PROMPT, "--seed", "7", *SMALL), ("--address", server.address, "--out", "-")
    piped = subprocess.run(
        [str(HIDREAM), *generate, *where], cwd=tmp_path, capture_output=True, check=True
    ).stdout
    with PIL.Image.open(io.BytesIO(piped)) as picture:
        picture.load()
        assert (picture.size, picture.format) == ((64, 64), "PNG")
    dropped = hidream(server.address, *generate, "--out", "/dev/null", folder=tmp_path)
    assert (dropped.returncode, dropped.stdout) == (0, "/dev/null\n")
    assert Path("/dev/null").is_char_device()
    assert not list(tmp_path.iterdir())
    with Client(server.address) as client:
        [job, *_] = client.list_page(states=["SUCCEEDED"]).jobs
    download = [str(HIDREAM), "download", job.job_id, *where]
    assert subprocess.run(download, cwd=tmp_path, capture_output=True, check=True).stdout == piped
    assert not list(tmp_path.iterdir())


def test_a_size_that_cannot_be_drawn_is_told_in_one_line(server: LiveServer, tmp_path: Path) -> None:
    result = hidream(server.address, "generate", PROMPT, "--size", "65x64", folder=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    [line] = [line for line in result.stderr.splitlines() if "hidream:" in line]
    assert line.startswith("hidream: --size (spec.width): ")
    assert not list(tmp_path.iterdir())


def test_every_wrong_option_has_its_line(server: LiveServer, tmp_path: Path) -> None:
    result = hidream(
        server.address, "generate", "", "--steps", "0", "--images", "99", "--seed", "-1", folder=tmp_path
    )
    assert result.returncode == 2
    flags = {line.split()[1] for line in result.stderr.splitlines() if line.startswith("hidream: ")}
    assert flags == {"PROMPT", "--steps", "--images", "--seed"}


def test_a_deadline_that_passes_ends_with_exit_code_1(server: LiveServer, tmp_path: Path) -> None:
    result = hidream(
        server.address,
        "generate",
        PROMPT,
        "--size",
        "64x64",
        "--steps",
        "150",
        "--timeout",
        "0.5",
        folder=tmp_path,
    )
    assert result.returncode == 1
    assert not list(tmp_path.iterdir())
    server.wait_until_idle()


def interruptible(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    """The command, started so that an interrupt reaches it."""
    # A test run that a shell started in the background ignores the interrupt, and so would its children.
    command: tuple[str | Path, ...] = ("env", "--default-signal=INT", HIDREAM, *arguments)
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def text_until(stream: IO[str] | None, wanted: str) -> str:
    """What a command prints up to something that it must print before it ends."""
    assert stream is not None
    text = ""
    while re.search(wanted, text) is None:
        character = stream.read(1)
        assert character, f"the command has ended: {text}"
        text += character
    return text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_cancels_the_job_and_exits_130(
    number: signal.Signals, server: LiveServer, tmp_path: Path
) -> None:
    num_cancelled = server.info().jobs.cancelled
    options = ("--size", "64x64", "--steps", "150", "--images", "4", "--address", server.address)
    with interruptible("generate", PROMPT, *options, folder=tmp_path) as process:
        text_until(process.stderr, "step 1 of 150")
        process.send_signal(number)
        assert "hidream: interrupted" in process.communicate()[1]
        assert process.returncode == 130
    wait_until(lambda: server.info().jobs.cancelled > num_cancelled, 30, "the job is cancelled")
    assert not list(tmp_path.iterdir())


def test_info_is_a_table_for_people_and_json_for_programs(server: LiveServer) -> None:
    table = hidream(server.address, "info")
    assert table.returncode == 0
    rows = dict(line.split(maxsplit=1) for line in table.stdout.splitlines())
    assert rows["state"] == "SERVING"
    answer = hidream(server.address, "info", "--json")
    info = json.loads(answer.stdout)
    assert info["state"] == "SERVER_STATE_SERVING"
    assert info["limits"]["max_num_images"] == server.info().limits.max_num_images
    assert info["num_rank_restarts"] is not None


def test_health_exits_0_when_the_service_serves(server: LiveServer) -> None:
    result = hidream(server.address, "health", "--wait", "30")
    assert (result.returncode, result.stdout) == (0, "SERVING\n")


def test_health_exits_3_when_the_service_does_not_serve(health_only_server: HealthOnlyServer) -> None:
    health_only_server.start()
    result = hidream(health_only_server.address, "health")
    assert (result.returncode, result.stdout) == (3, "NOT_SERVING\n")
    result = hidream(health_only_server.address, "health", "--wait", "0.5")
    assert result.returncode == 3
    assert "not serving after 0.5 s: its health is NOT_SERVING" in result.stderr


@pytest.mark.parametrize("arguments", [("info",), ("health",), ("generate", PROMPT)])
def test_an_address_where_nobody_listens_is_one_line_and_exit_code_3(
    arguments: tuple[str, ...], closed_address: str, tmp_path: Path
) -> None:
    result = hidream(closed_address, *arguments, folder=tmp_path)
    assert result.returncode == 3
    assert f"hidream: {closed_address}: " in result.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_generate_tells_programs_every_event_and_the_file_of_each_image(
    server: LiveServer, tmp_path: Path
) -> None:
    label, request_id = uuid.uuid4().hex, uuid.uuid4().hex
    options = ("--label", f"test={label}", "--priority", "high", "--request-id", request_id, "--detach")
    result = hidream(
        server.address,
        "generate",
        PROMPT,
        *SMALL,
        *options,
        "--images",
        "2",
        "--out",
        f"{tmp_path}/",
        "--json",
    )
    assert (result.returncode, result.stderr) == (0, "")
    events = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    assert [kind for kind in kinds if kind != "progress"][-3:] == [*["image_finished"] * 2, "succeeded"]
    written = {event["path"] for event in events if event["event"] == "image_finished"}
    assert written == {str(path) for path in tmp_path.iterdir()}
    job = events[-1]["job"]
    assert (job["request_id"], job["labels"], job["priority"]) == (
        request_id,
        {"test": label},
        "PRIORITY_HIGH",
    )


def test_an_id_may_be_as_short_as_list_prints_it(server: LiveServer) -> None:
    label = f"test={uuid.uuid4().hex}"
    submitted = hidream(server.address, "submit", PROMPT, *SMALL, "--label", label)
    _, line = hidream(server.address, "list", "--label", label).stdout.splitlines()
    short_id = line.split()[0]
    assert len(short_id) == 8
    assert submitted.stdout.startswith(short_id)
    assert hidream(server.address, "watch", short_id, "--quiet").stdout == "SUCCEEDED\n"
    assert hidream(server.address, "status", short_id).stdout.split()[:2] == ["job", submitted.stdout.strip()]
    assert hidream(server.address, "delete", short_id).stdout == submitted.stdout
    assert hidream(server.address, "status", short_id).returncode == 1


def test_a_detached_job_goes_on_when_its_command_is_interrupted(server: LiveServer, tmp_path: Path) -> None:
    options = ("--size", "64x64", "--steps", "150", "--detach", "--address", server.address)
    with (
        Client(server.address) as client,
        interruptible("generate", PROMPT, *options, folder=tmp_path) as process,
    ):
        text_until(process.stderr, "step 1 of 150")
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate()
        assert process.returncode == 130
        job_id = shown.split("hidream watch ")[1].split()[0]
        going_on = f"hidream watch {job_id} --out . --address {server.address}"
        assert shown.splitlines()[-2:] == [
            f"hidream: to go on with job {job_id}: {going_on}",
            "hidream: interrupted",
        ]
        assert client.status(job_id).state in (job_pb2.JOB_STATE_RUNNING, job_pb2.JOB_STATE_SUCCEEDED)
        client.cancel(job_id)


def test_what_a_command_prints_when_its_connection_is_lost_goes_on_with_its_job(
    server: LiveServer, tmp_path: Path
) -> None:
    label = uuid.uuid4().hex
    arguments = (*("generate", PROMPT, "--size", "64x64", "--steps", "60"), "--label", f"test={label}")
    with running_proxy(("127.0.0.1", int(server.address.rpartition(":")[2]))) as proxy:
        address = f"127.0.0.1:{proxy.port}"
        with interruptible(*arguments, "--address", address, folder=tmp_path) as process:
            text_until(process.stderr, "step 1 of 60")
            proxy.cut()
            told = text_until(process.stderr, r"to go on with job .*\n")
            process.send_signal(signal.SIGINT)
            assert "hidream: interrupted" in process.communicate()[1]
            assert process.returncode == 130
        proxy.heal()
        said = re.search(r"with job (\w+): the same command with (--request-id) (\w+) \(after 30 s ", told)
        assert said, told
        result = hidream(address, *arguments, *said.groups()[1:], folder=tmp_path)
        assert result.returncode == 0, result.stderr
    with Client(server.address) as client:
        [job] = client.list_jobs(labels={"test": label})
        assert (job.job_id, job.state) == (said[1], job_pb2.JOB_STATE_SUCCEEDED)
    assert len(list(tmp_path.iterdir())) == 1


# Interrupts the command while its modules are imported.
INTERRUPTED_START = """
import os, signal, sys
import hidream.cli

def interrupt(event, arguments):
    if event == "import" and arguments[0] == "hidream.command_line":
        os.kill(os.getpid(), signal.SIGINT)

sys.addaudithook(interrupt)
hidream.cli.main()
"""


def test_an_interrupt_while_the_command_starts_leaves_no_traceback() -> None:
    command = ["env", "--default-signal=INT", sys.executable, "-c", INTERRUPTED_START]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, "", "")


def test_a_reader_that_has_seen_enough_is_no_error(server: LiveServer) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [str(HIDREAM), "info", "--address", server.address]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (result.returncode, result.stderr) == (1, b"")


def test_a_terminal_gets_a_bar_that_moves_with_the_steps(server: LiveServer, tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    command = [str(HIDREAM), "generate", PROMPT, *SMALL, "--address", server.address]
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=theirs)
        os.close(theirs)
        shown = b""
        # The end of a pseudoterminal is an error.
        with suppress(OSError):
            while piece := terminal.read(4096):
                shown += piece
        assert process.wait() == 0
    bar = shown.decode().split("\r")
    assert any("step 3 of 3" in frame and frame.startswith("drawing") for frame in bar)
