"""The start script: what it refuses, and what it would become. No server is started here."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "scripts" / "start_service.sh"


def start_service(
    *arguments: str | Path, cwd: Path = REPOSITORY, script: Path = SCRIPT, variables: Mapping[str, str] = {}
) -> subprocess.CompletedProcess[str]:
    search_path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [script, *arguments],
        cwd=cwd,
        env={**os.environ, "PATH": search_path, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )


@dataclass(frozen=True)
class ServerCommand:
    """What `--dry-run` shows."""

    working_directory: Path
    python: Path
    options: dict[str, str]


def server_command(*arguments: str | Path, cwd: Path = REPOSITORY, script: Path = SCRIPT) -> ServerCommand:
    result = start_service(*arguments, "--dry-run", cwd=cwd, script=script)
    assert (result.returncode, result.stderr) == (0, "")
    change_directory, execute = map(shlex.split, result.stdout.splitlines())
    assert change_directory[0] == "cd"
    assert execute[0] == "exec"
    assert execute[2:5] == ["-m", "hidream_grpc", "serve"]
    options = dict(zip(execute[5::2], execute[6::2], strict=True))
    return ServerCommand(Path(change_directory[1]), Path(execute[1]), options)


def refusal(*arguments: str | Path, script: Path = SCRIPT) -> str:
    """The one line on stderr of a start that is refused."""
    result = start_service(*arguments, script=script)
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "HiDream I1"
    folder.mkdir()
    return folder


@pytest.fixture
def llama_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "Llama"
    folder.mkdir()
    return folder


def test_the_demo_listens_where_the_old_server_did_on_one_device_from_the_project() -> None:
    command = server_command("--demo")
    assert command.working_directory == REPOSITORY
    assert re.fullmatch(
        re.escape(f"{REPOSITORY}/logs/hidream_") + r"\d{8}_\d{6}\.log", command.options.pop("--log-file")
    )
    assert command.options == {"--devices": "0", "--listen": "0.0.0.0:8088"}


@pytest.mark.parametrize("short", [True, False], ids=["short flags", "long flags"])
def test_every_flag_of_the_old_server_reaches_the_new_one(
    model_folder: Path, llama_folder: Path, short: bool
) -> None:
    values: dict[tuple[str, str], str | Path] = {
        ("-m", "--model-path"): model_folder,
        ("-e", "--extra-model-path"): llama_folder,
        ("-p", "--project-path"): REPOSITORY,
        ("-d", "--devices"): "0,1,4-5",
        ("-c", "--device-count"): "4",
        ("-t", "--device-type"): "npu",
    }
    flags = [item for (brief, full), value in values.items() for item in (brief if short else full, value)]
    command = server_command(
        *flags,
        *("--host", "127.0.0.1", "--port", "9090", "--log-level", "DEBUG", "--log-format", "json"),
    )
    del command.options["--log-file"]
    assert command.options == {
        "--model-path": str(model_folder),
        "--extra-model-path": str(llama_folder),
        "--devices": "0,1,4-5",
        "--device-type": "npu",
        "--listen": "127.0.0.1:9090",
        "--log-level": "DEBUG",
        "--log-format": "json",
    }


@pytest.mark.parametrize(("count", "devices"), [("1", "0"), ("4", "0-3")])
def test_a_device_count_alone_names_the_first_devices(count: str, devices: str) -> None:
    assert server_command("--demo", "-c", count).options["--devices"] == devices


def test_a_device_count_is_checked_against_the_devices_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HIDREAM_DEVICES", "4-7")
    assert server_command("--demo", "-c", "4").options["--devices"] == "4-7"
    assert refusal("--demo", "-c", "2") == "start_service: --device-count: 2, but --devices 4-7 names 4"


def test_the_name_of_the_replaced_server_s_script_is_a_link_to_this_one() -> None:
    assert SCRIPT.with_name("start_hidream_service.sh").resolve() == SCRIPT


def test_a_flag_may_be_joined_to_its_value() -> None:
    assert server_command("--demo", "--port=9090").options["--listen"] == "0.0.0.0:9090"


def test_an_ipv6_host_is_bracketed() -> None:
    assert server_command("--demo", "--host", "::1").options["--listen"] == "[::1]:8088"


def test_what_follows_two_dashes_goes_to_the_server_untouched() -> None:
    result = start_service("--demo", "--dry-run", "--", "--metrics-port", "9100", "--demo")
    assert shlex.split(result.stdout)[-3:] == ["--metrics-port", "9100", "--demo"]


def test_folders_are_those_of_the_caller_s_own_directory(
    model_folder: Path, llama_folder: Path, tmp_path: Path
) -> None:
    command = server_command("-m", model_folder.name, "-e", f"./{llama_folder.name}", cwd=tmp_path)
    assert command.working_directory == REPOSITORY
    assert command.options["--model-path"] == str(model_folder)
    assert command.options["--extra-model-path"] == str(llama_folder)


def test_a_model_that_holds_its_llama_needs_no_extra_model(model_folder: Path) -> None:
    (model_folder / "text_encoder_4").mkdir()
    assert "--extra-model-path" not in server_command("-m", model_folder).options


def test_the_script_finds_its_project_through_a_link(tmp_path: Path) -> None:
    link = tmp_path / "start"
    link.symlink_to(SCRIPT)
    result = subprocess.run([link, "--demo", "--dry-run"], capture_output=True, text=True, timeout=60)
    assert shlex.split(result.stdout)[:2] == ["cd", str(REPOSITORY)]


def test_another_project_path_is_where_it_runs_and_logs(tmp_path: Path) -> None:
    command = server_command("--demo", "-p", tmp_path)
    assert command.working_directory == tmp_path
    assert Path(command.options["--log-file"]).parent == tmp_path / "logs"


def test_the_environment_is_the_project_s_or_else_that_of_the_script_or_else_python3(tmp_path: Path) -> None:
    own_project, other_project = tmp_path / "own", tmp_path / "other"
    script = own_project / "scripts" / SCRIPT.name
    script.parent.mkdir(parents=True)
    other_project.mkdir()
    shutil.copy(SCRIPT, script)

    def python() -> Path:
        return server_command("--demo", "-p", other_project, script=script).python

    assert python() == Path(sys.executable).parent / "python3"
    for project in (own_project, other_project):
        its_python = project / ".venv" / "bin" / "python"
        its_python.parent.mkdir(parents=True)
        its_python.symlink_to(sys.executable)
        assert python() == its_python


def test_a_python_without_the_service_is_one_line_that_names_both_places(tmp_path: Path) -> None:
    own_project, other_project = tmp_path / "own", tmp_path / "other"
    python = own_project / ".venv" / "bin" / "python"
    for folder in (own_project / "scripts", python.parent, other_project):
        folder.mkdir(parents=True)
    shutil.copy(SCRIPT, own_project / "scripts")
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    assert refusal("--demo", "-p", other_project, script=own_project / "scripts" / SCRIPT.name) == (
        f"start_service: hidream-grpc is not installed for {python}, and there is no other .venv in "
        f"{other_project} or {own_project}: run {own_project}/scripts/install.sh"
    )


@pytest.mark.parametrize(
    ("flags", "bridge", "trusted"),
    [
        ((), {"--listen": "0.0.0.0:8080", "--server": "localhost:8088"}, "127.0.0.1,::1"),
        (
            ("--host", "::1", "--port", "9", "--", "--trusted-proxies", "10.0.0.1"),
            {"--listen": "[::1]:8080", "--server": "[::1]:9"},
            "10.0.0.1",
        ),
        (
            ("--host", "10.0.0.5"),
            {"--listen": "10.0.0.5:8080", "--server": "10.0.0.5:8088"},
            "127.0.0.1,::1,10.0.0.5",
        ),
        (
            ("--host", "2001:db8::5"),
            {"--listen": "[2001:db8::5]:8080", "--server": "[2001:db8::5]:8088"},
            "127.0.0.1,::1,2001:db8::5",
        ),
        (
            ("--host", "localhost"),
            {"--listen": "localhost:8080", "--server": "localhost:8088"},
            "127.0.0.1,::1",
        ),
    ],
)
def test_a_port_of_http_adds_a_bridge_that_speaks_for_its_callers(
    flags: tuple[str, ...], bridge: dict[str, str], trusted: str
) -> None:
    shown = start_service("--demo", "--http-port", "8080", "--dry-run", *flags).stdout
    _, beside, server = map(shlex.split, shown.splitlines())
    options = dict(zip(beside[3:-1:2], beside[4:-1:2], strict=True))
    del options["--parent-pid"]
    assert (beside[1:3], beside[-1], options) == (["-m", "hidream_http"], "&", bridge)
    assert server[server.index("--trusted-proxies") + 1] == trusted
    assert server.count("--trusted-proxies") == 1
    assert "--trusted-bridges" not in server


def test_a_bridge_that_asks_for_certificates_is_believed_whose_it_saw() -> None:
    certificates = {"HIDREAM_HTTP_TLS_CLIENT_CA": "/etc/callers.pem"}
    shown = start_service("--demo", "--http-port", "8080", "--dry-run", variables=certificates).stdout
    server = shlex.split(shown.splitlines()[-1])
    assert server[server.index("--trusted-bridges") + 1] == "127.0.0.1,::1"


@pytest.mark.parametrize(
    ("variables", "flags", "line"),
    [
        ({}, ("--listen", "0.0.0.0:9000"), "--listen: give --host and --port"),
        ({}, ("--listen=0.0.0.0:9000",), "--listen: give --host and --port"),
        ({}, ("--tls-certificate", "a"), "HIDREAM_HTTP_SERVER_CA"),
        ({"HIDREAM_TLS_CERTIFICATE": "a"}, (), "HIDREAM_HTTP_SERVER_CA"),
    ],
)
def test_a_server_that_the_bridge_could_not_call_is_refused(
    variables: dict[str, str], flags: tuple[str, ...], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    arguments = ("--demo", "--http-port", "8080", "--dry-run", "--", *flags)
    assert line in refusal(*arguments)
    # Whoever says where and how to call knows it.
    monkeypatch.setenv("HIDREAM_HTTP_SERVER", "localhost:9000")
    monkeypatch.setenv("HIDREAM_HTTP_SERVER_CA", "authority.pem")
    assert start_service(*arguments).returncode == 0


def test_a_bridge_that_ends_at_once_ends_the_start_with_its_own_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = start_service("--demo", "--host", "127.0.0.1", "--port", "1", "--http-port", str(port))
    assert result.returncode == 2
    assert result.stderr == f"hidream-http: --listen: 127.0.0.1:{port} is in use\n"


def test_a_dry_run_leaves_nothing_behind(tmp_path: Path) -> None:
    server_command("--demo", "-p", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_help_shows_every_flag_with_its_default() -> None:
    result = start_service("--help")
    assert result.returncode == 0
    flags = {"-m", "-e", "-p", "-d", "-c", "-t", "-h", "--model-path", "--extra-model-path", "--project-path"}
    flags |= {"--devices", "--device-count", "--device-type", "--port", "--host", "--demo", "--log-level"}
    flags |= {"--log-format", "--http-port", "--dry-run", "--help"}
    assert flags <= set(re.findall(r"--?[a-z][a-z-]*", result.stdout))
    for default in ("/data/HiDream-I1-Full", "/data/Llama-3.1-8B-Instruct", "8088", "0.0.0.0"):
        assert default in result.stdout


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        pytest.param(["--demo", "--model"], "--model: unknown flag (--help shows all)", id="unknown flag"),
        pytest.param(
            ["--demo", "--http-port", "http"], "--http-port: http is no port: 0 to 65535", id="port of HTTP"
        ),
        pytest.param(
            ["--demo", "--http-port", "8080", "--port", "0"],
            "--http-port: needs a --port other than 0, to find the server",
            id="a port of the server that the bridge cannot know",
        ),
        pytest.param(["--demo", "-x"], "-x: unknown flag (--help shows all)", id="unknown short flag"),
        pytest.param(["demo"], "demo: unknown flag (--help shows all)", id="stray word"),
        pytest.param(["-m"], "-m: needs a value", id="nothing after the flag"),
        pytest.param(["--port", "--demo"], "--port: needs a value", id="another flag after the flag"),
        pytest.param(["--host="], "--host: needs a value", id="empty value"),
        pytest.param(["-m", "/no/model"], "--model-path: /no/model: no such folder", id="no model folder"),
        pytest.param(
            ["--demo", "-p", "/no/project"], "--project-path: /no/project: no such folder", id="no project"
        ),
        pytest.param(
            ["--demo", "-m", "/no/model"],
            "--demo: has a model of its own; leave out --model-path and --extra-model-path",
            id="two models",
        ),
        pytest.param(
            ["--demo", "-d", "0-3", "-c", "2"], "--device-count: 2, but --devices 0-3 names 4", id="count"
        ),
        pytest.param(["--demo", "-c", "0"], "--device-count: 0 is no number of devices", id="no device"),
        pytest.param(
            ["--demo", "-c", "all"], "--device-count: all is no number of devices", id="count in words"
        ),
        pytest.param(
            ["--demo", "-d", "1,1", "-c", "2"],
            "--devices: device 1 is named twice in '1,1'",
            id="bad devices",
        ),
        pytest.param(["--demo", "--port", "http"], "--port: http is no port: 0 to 65535", id="port in words"),
        pytest.param(
            ["--demo", "--port", "65536"], "--port: 65536 is no port: 0 to 65535", id="port too high"
        ),
    ],
)
def test_a_bad_start_is_refused_with_one_line_that_names_the_flag(arguments: list[str], line: str) -> None:
    assert refusal(*arguments) == f"start_service: {line}"


@pytest.mark.parametrize("variable", ["DEVICES", "MODEL_PATH", "EXTRA_MODEL_PATH", "LISTEN"])
def test_an_empty_variable_is_refused_as_by_the_server(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"HIDREAM_{variable}", " ")
    assert refusal("--demo") == (
        f"start_service: HIDREAM_{variable}: is empty; leave it out to have its default"
    )


def test_a_missing_llama_folder_is_one_line(model_folder: Path) -> None:
    assert refusal("-m", model_folder, "-e", "/no/llama") == (
        "start_service: --extra-model-path: /no/llama: no such folder"
    )


def test_a_project_that_cannot_hold_logs_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    assert refusal("--demo", "-p", tmp_path) == (
        f"start_service: --project-path: cannot create {tmp_path}/logs"
    )
