import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import duration_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from typer.testing import CliRunner

import hidream
from hidream.batch_lines import InvalidLinesError, LineViolation
from hidream.command_line import GoingOn, error_lines, exit_code
from hidream.commands import app
from hidream.errors import (
    FieldViolation,
    HiDreamError,
    InvalidArgumentError,
    NotServingError,
    StreamError,
    error_from_status,
)
from hidream.options import VARIABLES, Size
from hidream.v1 import image_pb2

ADDRESS = "localhost:8088"


def status(code: int, message: str = "what happened") -> status_pb2.Status:
    return status_pb2.Status(code=code, message=message)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        pytest.param(["generate", "a", "--size", "512"], "'512' is not WIDTHxHEIGHT", id="half a size"),
        pytest.param(["generate", "a", "--size", "-1x5"], "'-1x5' is not WIDTHxHEIGHT", id="a negative size"),
        pytest.param(["generate", "a", "--steps", "many"], "'--steps'", id="steps that are no number"),
        pytest.param(["generate", "a", "--format", "gif"], "'--format'", id="an unknown format"),
        pytest.param(["generate", "a", "--out", "no/such/a.png"], "no/such: no such folder", id="no folder"),
        pytest.param(["generate", "a", "--out", "a.gif"], "'a.gif' names none of", id="an unknown suffix"),
        pytest.param(
            ["generate", "a", "--out", "a.png", "--format", "webp"],
            "'a.png' is no name of a webp file",
            id="a suffix of another format",
        ),
        pytest.param(
            ["generate", "a", "--seed", str(2**64)],
            "hidream: --seed (spec.seed): Value out of range",
            id="a seed that no message can carry",
        ),
        pytest.param(["generate"], "a prompt is missing, or --like", id="no prompt"),
        pytest.param(["show", "a.png"], "a.png: No such file", id="no image to show"),
        pytest.param(["generate", "--like", "/dev/null"], "cannot be read as an image", id="like no image"),
        pytest.param(
            ["generate", "a", "--out", "-", "--images", "2"],
            "stdout takes one image only",
            id="two into stdout",
        ),
        pytest.param(
            ["generate", "a", "--out", "/dev/null", "--preview"],
            "previews are files beside that of the image",
            id="previews beside a device",
        ),
        pytest.param(["submit", "a", "--label", "red"], "'red' is not KEY=VALUE", id="a label without value"),
        pytest.param(["list", "--state", "done"], "'--state'", id="a state that jobs do not have"),
        pytest.param(
            ["watch", "1", "--state", "queued"],
            "--state and --label are for watching all jobs",
            id="a filter for one job",
        ),
        pytest.param(["watch", "--out", "a.png"], "it is for watching one job", id="a file for all jobs"),
        pytest.param(["paint", "a"], "No such command 'paint'", id="an unknown command"),
        pytest.param(["info", "--jsn"], "No such option: --jsn", id="an unknown option"),
        pytest.param(["info", "--timeout"], "'--timeout' requires an argument", id="no value"),
        pytest.param(["status", "a", "b"], "unexpected extra argument", id="an argument too many"),
        pytest.param(["info", "--address", "localhost:99999"], "port '99999' is not 1 to 65535", id="a port"),
    ],
)
def test_a_wrong_command_line_is_one_clear_line_and_exit_code_2(
    arguments: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    [told] = result.stderr.splitlines()
    assert told.startswith("hidream: ")
    assert line in told
    assert not list(tmp_path.iterdir())


def test_several_images_into_a_named_pipe_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    result = CliRunner().invoke(app, ["generate", "a", "--images", "2", "--out", str(tmp_path / "a.png")])
    assert result.exit_code == 2
    assert "a named pipe takes one image only" in result.stderr


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        pytest.param(error_from_status(status(code_pb2.INVALID_ARGUMENT)), 2, id="invalid"),
        pytest.param(error_from_status(status(code_pb2.UNAVAILABLE)), 3, id="unavailable"),
        pytest.param(error_from_status(status(code_pb2.RESOURCE_EXHAUSTED)), 3, id="exhausted"),
        pytest.param(NotServingError(5.0, None), 3, id="not serving"),
        pytest.param(error_from_status(status(code_pb2.DEADLINE_EXCEEDED)), 1, id="deadline"),
        pytest.param(error_from_status(status(code_pb2.INTERNAL)), 1, id="internal"),
        pytest.param(StreamError("a gap"), 1, id="a broken stream"),
        pytest.param(InvalidLinesError([LineViolation(1, "seed", "is wrong")]), 2, id="a bad line"),
    ],
)
def test_the_exit_code_tells_whether_to_try_again(error: HiDreamError, expected: int) -> None:
    assert exit_code(error) == expected


def test_each_bad_field_is_a_line_that_names_its_flag() -> None:
    error = InvalidArgumentError.from_violations(
        (
            FieldViolation("spec.width", "must be a multiple of 16"),
            FieldViolation("spec.prompt", "is required"),
        )
    )
    assert error_lines(error, ADDRESS) == [
        "--size (spec.width): must be a multiple of 16",
        "PROMPT (spec.prompt): is required",
    ]


def test_every_field_of_an_image_has_a_flag() -> None:
    command = CliRunner().invoke(app, ["generate", "--help"]).stdout
    for field in image_pb2.ImageSpec.DESCRIPTOR.fields_by_name:
        [line] = error_lines(
            InvalidArgumentError.from_violations((FieldViolation(f"spec.{field}", "is wrong"),)), ADDRESS
        )
        assert line.split()[0].lower() in command.lower()


def test_an_error_of_the_server_names_it_and_says_when_to_try_again() -> None:
    details = status(code_pb2.UNAVAILABLE, "the model loads")
    retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=5))
    details.details.add().Pack(retry)
    assert error_lines(error_from_status(details), ADDRESS) == [
        "localhost:8088: the model loads; try again in 5 s"
    ]


def test_a_failure_of_the_server_always_tells_its_id() -> None:
    details = status(code_pb2.INTERNAL, "internal error")
    details.details.add().Pack(error_details_pb2.ErrorInfo(metadata={"error_id": "a1b2"}))
    assert error_lines(error_from_status(details), ADDRESS) == [
        "localhost:8088: internal error (error id a1b2)"
    ]


@pytest.mark.parametrize(
    ("command", "options", "connection", "line"),
    [
        ("generate", {}, {}, "hidream watch j --out ."),
        (
            "generate",
            {"out": "a fox.png"},
            {"address": "a:1"},
            "hidream watch j --out 'a fox.png' --address a:1",
        ),
        ("watch", {"out": None}, {"token": "secret"}, "hidream watch j --token TOKEN"),
        (
            "download",
            {"out": "a.png", "index": [0, 2]},
            {},
            "hidream download j --out a.png --index 0 --index 2",
        ),
        (
            *("watch", {"out": None}),
            {"tls": True, "ca_file": Path("ca"), "cert_file": Path("c"), "key_file": Path("k")},
            "hidream watch j --tls --ca-file ca --cert-file c --key-file k",
        ),
    ],
)
def test_a_command_that_lost_its_server_names_the_one_that_goes_on(
    command: str, options: dict[str, Any], connection: dict[str, Any], line: str
) -> None:
    error = error_from_status(status(code_pb2.UNAVAILABLE, "gone"))
    error.followed_job_id = "j"
    unused = dict.fromkeys(VARIABLES) | {"address": ADDRESS, "tls": False}
    going_on = GoingOn.after(command, options, unused | connection)
    assert error_lines(error, ADDRESS, going_on) == [f"{ADDRESS}: gone; to go on with job j: {line}"]


@pytest.mark.parametrize(
    ("held_seconds", "when"), [(30.0, "after 30 s it may start anew"), (0.0, "it may start anew")]
)
def test_a_job_that_stops_without_its_caller_is_gone_on_with_by_its_request_id(
    held_seconds: float, when: str
) -> None:
    error = error_from_status(status(code_pb2.UNAVAILABLE, "gone"))
    error.followed_job_id, error.followed_request_id, error.held_seconds = "j", "r", held_seconds
    line = f"to go on with job j: the same command with --request-id r ({when})"
    assert GoingOn("watch", ()).after_loss(error) == line


@pytest.mark.parametrize("blank", ["", " "], ids=["empty", "space"])
@pytest.mark.parametrize(
    ("arguments", "variable", "named"),
    [
        *(([], variable, variable) for variable in VARIABLES.values()),
        (["--token", "a-token-0123456789"], "HIDREAM_TOKEN", "HIDREAM_TOKEN"),
        (["--token"], None, "--token"),
        (["--address"], None, "--address"),
    ],
    ids=[*VARIABLES, "beside its flag", "the token's flag", "the address's flag"],
)
def test_an_empty_value_of_the_connection_is_refused(
    arguments: list[str], variable: str | None, named: str, blank: str
) -> None:
    # HIDREAM_TLS of blanks is no truth value, which typer says itself.
    if (variable, blank) == ("HIDREAM_TLS", " "):
        return
    environment = {variable: blank} if variable else {}
    command = ["info", *arguments, *([] if variable else [blank])]
    result = CliRunner().invoke(app, command, env=environment)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"hidream: {named}: is empty; leave it out to have its default\n"


def test_the_version_and_the_help_have_the_usual_flags() -> None:
    version = CliRunner().invoke(app, ["--version"])
    assert (version.exit_code, version.stdout) == (0, f"hidream {hidream.__version__}\n")
    for command in ([], ["generate"], ["list"]):
        short, long = (CliRunner().invoke(app, [*command, flag]) for flag in ("-h", "--help"))
        assert (short.exit_code, short.stdout) == (0, long.stdout)
        assert "Usage: " in short.stdout


def test_a_call_without_a_command_prints_the_help_and_exits_2() -> None:
    result = CliRunner().invoke(app, [])
    assert (result.exit_code, result.stdout) == (2, "")
    assert "generate" in result.stderr


@pytest.mark.parametrize(
    ("words", "candidate"), [("hidream ge", "generate"), ("hidream list --state ru", "running")]
)
def test_a_shell_completes_commands_and_values(words: str, candidate: str) -> None:
    environment = {
        "_HIDREAM_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    result = CliRunner().invoke(app, [], env=environment, prog_name="hidream")
    assert (result.exit_code, result.stdout.split()) == (0, [candidate])


def test_a_size_may_have_the_sign_that_info_prints() -> None:
    assert Size.parse("512×768") == Size.parse("512X768") == Size(512, 768)


def test_the_package_runs_as_the_command() -> None:
    command = [sys.executable, "-m", "hidream", "--version"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (answer.stdout, answer.stderr) == (f"hidream {hidream.__version__}\n", "")
