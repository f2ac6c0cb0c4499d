from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import PIL.Image
import pytest

from hidream.client import Client
from tests.clients.conftest import HealthOnlyServer
from tests.support.live_server import LiveServer, wait_until

HIDREAM = Path(sys.executable).parent / "hidream"
PROMPT = "a red circle on a blue background"
SMALL = ("--size", "64x64", "--steps", "3")


def hidream(address: str, *arguments: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The installed command, as a shell runs it."""
    return subprocess.run(
        [HIDREAM, *arguments, "--address", address], cwd=folder, capture_output=True, text=True, check=False
    )


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
    where = ("--address", server.address, "--out")
    command = [str(HIDREAM), "generate", PROMPT, "--seed", "7", *SMALL, *where]
    piped = subprocess.run([*command, "-"], cwd=tmp_path, capture_output=True, check=True).stdout
    with PIL.Image.open(io.BytesIO(piped)) as picture:
        picture.load()
        assert (picture.size, picture.format) == ((64, 64), "PNG")
    dropped = subprocess.run([*command, "/dev/null"], cwd=tmp_path, capture_output=True, check=True)
    assert dropped.stdout == b"/dev/null\n"
    assert Path("/dev/null").is_char_device()
    assert not list(tmp_path.iterdir())
    with Client(server.address) as client:
        [job, *_] = client.list_page(states=["SUCCEEDED"]).jobs
    download = [str(HIDREAM), "download", job.job_id, *where, "-"]
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


def test_an_interrupt_cancels_the_job_and_exits_130(server: LiveServer, tmp_path: Path) -> None:
    num_cancelled = server.info().jobs.cancelled
    # A test run that a shell started in the background ignores the interrupt, and so would its children.
    command: tuple[str | Path, ...] = ("env", "--default-signal=INT", HIDREAM)
    options = ("--size", "64x64", "--steps", "150", "--images", "4", "--address", server.address)
    with subprocess.Popen(
        [*command, "generate", PROMPT, *options],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        output = ""
        while "step 1 of 150" not in output:
            character = process.stderr.read(1)
            assert character, f"the command has ended: {output}"
            output += character
        process.send_signal(signal.SIGINT)
        assert "hidream: interrupted" in process.stderr.read()
        assert process.wait() == 130
    wait_until(lambda: server.info().jobs.cancelled == num_cancelled + 1, 30, "the job is cancelled")
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
