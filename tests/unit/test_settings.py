from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typer.models
from typer.testing import CliRunner

from hidream import options
from hidream_grpc.cli import app
from hidream_grpc.errors import ConfigurationError
from hidream_grpc.jobs.limits import RequestLimits
from hidream_grpc.settings import (
    ENVIRONMENT_PREFIX,
    VARIABLES_OF_CLIENTS,
    Settings,
    describe_unknown_variables,
    flag_name,
    load_settings,
)
from hidream_grpc.settings_help import help_of
from tests.support.file_names import ODD_FILE_NAMES

# Adding or renaming a flag changes what operators have in their scripts.
FLAGS = {
    "-d",
    "-e",
    "-m",
    "-t",
    "--artifacts",
    "--c2pa-certificate",
    "--c2pa-key",
    "--chunk-bytes",
    "--collective-timeout-seconds",
    "--compile-shapes",
    "--config",
    "--data-dir",
    "--device-type",
    "--devices",
    "--drain-delay-seconds",
    "--extra-model-path",
    "--grace-seconds",
    "--help",
    "--image-metadata",
    "--layout",
    "--lease-seconds",
    "--listen",
    "--load-timeout-seconds",
    "--log-file",
    "--log-format",
    "--log-level",
    "--max-guidance-scale",
    "--max-num-images",
    "--max-num-inference-steps",
    "--max-pixel-steps-per-minute-per-caller",
    "--max-prompt-bytes",
    "--max-prompt-tokens",
    "--max-queued-jobs",
    "--max-queued-jobs-per-caller",
    "--max-receive-message-bytes",
    "--max-retained-bytes",
    "--max-retained-jobs",
    "--max-running-jobs",
    "--max-running-jobs-per-caller",
    "--max-step-pixels",
    "--max-streams",
    "--max-streams-per-caller",
    "--metrics-port",
    "--model-path",
    "--orphan-sweep-seconds",
    "--replace",
    "--retention-dry-run",
    "--retention-seconds",
    "--store",
    "--store-outage-seconds",
    "--text-encoder-weights",
    "--threads-per-rank",
    "--tls-certificate",
    "--tls-client-ca",
    "--tls-key",
    "--tokens-file",
    "--trusted-bridges",
    "--trusted-proxies",
    "--weights",
}
# They bound what the server does, not what a request may ask for.
LIMITS_OF_THE_SERVER_ALONE = {"max_step_pixels", "max_retained_bytes", "max_retained_jobs"}


@pytest.fixture(autouse=True)
def no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(ENVIRONMENT_PREFIX + name.upper(), raising=False)


def help_of_serve(columns: int = 80) -> str:
    result = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0
    return result.stdout


def entries_of_help(columns: int = 80) -> dict[str, str]:
    """What stands under each flag of the help, in one line, by the line with its names and its type."""
    entries = re.findall(r"(?m)^  (-.*)\n((?: {8}.*\n)+)", help_of_serve(columns))
    return {names: " ".join(text.split()) for names, text in entries}


@pytest.mark.parametrize("columns", [20, 80, 200])
def test_these_are_all_flags_of_the_serve_command_on_a_terminal_of_any_width(columns: int) -> None:
    names = [name for line in entries_of_help(columns) for name in re.findall(r"--?[a-z][a-z0-9-]*", line)]
    assert sorted(names) == sorted(FLAGS)


def test_the_help_without_a_terminal_cuts_nothing() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "hidream_grpc", "serve", "--help"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert "  --max-pixel-steps-per-minute-per-caller INTEGER\n" in ended.stdout
    assert "…" not in ended.stdout


def test_the_help_has_these_groups() -> None:
    groups = re.findall(r"(?m)^([A-Z]\w+):$", help_of_serve())
    assert groups == [
        "Model",
        "Devices",
        "Listening",
        "Jobs",
        "Images",
        "Limits",
        "Callers",
        "Logging",
        "Other",
    ]


@pytest.mark.parametrize("columns", [20, 80, 200])
def test_every_default_stands_in_the_help(columns: int) -> None:
    entries = {names.split()[-2]: text for names, text in entries_of_help(columns).items() if " " in names}
    for name, field in Settings.model_fields.items():
        shown = re.search(r"default: (.*)\]$", entries[flag_name(name)])
        assert shown is not None, name
        if field.default is None:
            assert shown[1] == help_of(field).when_absent
        else:
            assert getattr(load_settings({name: shown[1]}, None), name) == field.default


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (
            "-m, --model-path PATH",
            "folder of HiDream-I1, in diffusers format [default: the built-in demo model]",
        ),
        (
            "--replace one|all",
            "which ranks are started again when one dies [default: all on npu and cuda, one on cpu]",
        ),
        (
            "--retention-dry-run true|false",
            "log which jobs would be removed, and keep them [default: false]",
        ),
        ("--max-num-images INTEGER", "images of one request [1 to 64; default: 8]"),
        ("--max-guidance-scale NUMBER", "guidance scale of one request [above 0, at most 100; default: 20]"),
    ],
)
def test_the_help_says_the_type_the_range_and_the_default(names: str, text: str) -> None:
    assert entries_of_help()[names] == text


def test_every_setting_has_a_flag_and_a_meaning() -> None:
    assert {flag_name(name) for name in Settings.model_fields} <= FLAGS
    for name, field in Settings.model_fields.items():
        assert help_of(field).meaning
        assert (help_of(field).when_absent is None) == (field.default is not None), name


def test_every_limit_that_an_operator_sets_for_requests_is_shown_to_callers() -> None:
    limits = {name for name in Settings.model_fields if name.startswith("max_") or name == "chunk_bytes"}
    shown = {field.name for field in dataclasses.fields(RequestLimits)}
    assert limits - LIMITS_OF_THE_SERVER_ALONE <= shown


def test_one_caller_has_at_most_a_fifth_of_the_streams_by_default() -> None:
    settings = load_settings({}, None)
    assert settings.max_streams_per_caller * 5 == settings.max_streams


def test_a_flag_goes_before_the_environment_the_environment_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file = tmp_path / "hidream.toml"
    config_file.write_text("max_queued_jobs = 1\nmax_running_jobs = 1\nmax_streams = 1\n", encoding="utf-8")
    monkeypatch.setenv("HIDREAM_MAX_QUEUED_JOBS", "2")
    monkeypatch.setenv("HIDREAM_MAX_RUNNING_JOBS", "2")
    settings = load_settings({"max_queued_jobs": 3}, str(config_file))
    assert (settings.max_queued_jobs, settings.max_running_jobs, settings.max_streams) == (3, 2, 1)
    assert settings.chunk_bytes == Settings.model_fields["chunk_bytes"].default


OUT_OF_RANGE = {
    "max_queued_jobs": "0",
    "max_running_jobs": "0",
    "max_queued_jobs_per_caller": "0",
    "max_running_jobs_per_caller": "0",
    "max_pixel_steps_per_minute_per_caller": "0",
    "max_streams": "-1",
    "max_streams_per_caller": "0",
    "max_num_images": "65",
    "max_num_inference_steps": "many",
    "max_guidance_scale": "nan",
    "max_prompt_bytes": "1",
    "max_prompt_tokens": "257",
    "chunk_bytes": "4194304",
    "metrics_port": "65536",
    "retention_seconds": "-1",
    "orphan_sweep_seconds": "-1",
    "lease_seconds": "0",
    "store_outage_seconds": "0",
    "max_retained_bytes": "0",
    "retention_dry_run": "perhaps",
    "grace_seconds": "inf",
    "replace": "some",
    "log_level": "LOUD",
    "log_format": "xml",
    "threads_per_rank": "0",
}


@pytest.mark.parametrize(("field", "value"), OUT_OF_RANGE.items(), ids=list(OUT_OF_RANGE))
def test_a_value_out_of_range_is_told_with_its_flag_or_its_variable(
    field: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load_settings({field: value}, None)
    assert refused.value.name == flag_name(field)
    assert refused.value.reason
    monkeypatch.setenv(ENVIRONMENT_PREFIX + field.upper(), value)
    with pytest.raises(ConfigurationError) as refused:
        load_settings({}, None)
    assert refused.value.name == ENVIRONMENT_PREFIX + field.upper()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"max_queued_jobs = 'some'", "max_queued_jobs"),
        (b"max_qeued_jobs = 3", "max_qeued_jobs"),
        (b"max_queued_jobs =", "hidream.toml"),
        (b"\xff\xfe", "hidream.toml"),
    ],
    ids=["wrong type", "unknown key", "no TOML", "no text"],
)
def test_a_bad_file_is_told_in_one_line_that_names_it(tmp_path: Path, content: bytes, words: str) -> None:
    config_file = tmp_path / "hidream.toml"
    config_file.write_bytes(content)
    with pytest.raises(ConfigurationError) as refused:
        load_settings({}, str(config_file))
    assert words in str(refused.value)
    assert str(config_file) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("field", "blank"), [*((field, "") for field in Settings.model_fields), ("store", " "), ("store", "\t\n")]
)
def test_an_empty_value_is_refused_wherever_it_stands(
    field: str, blank: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file = tmp_path / "hidream.toml"
    config_file.write_text(f"{field} = {json.dumps(blank)}", encoding="utf-8")
    reason = "is empty; leave it out to have its default"
    with pytest.raises(ConfigurationError) as refused:
        load_settings({}, str(config_file))
    assert str(refused.value) == f"{field} ({config_file}): {reason}"
    monkeypatch.setenv(ENVIRONMENT_PREFIX + field.upper(), blank)
    with pytest.raises(ConfigurationError) as refused:
        load_settings({}, str(config_file))
    assert str(refused.value) == f"{ENVIRONMENT_PREFIX}{field.upper()}: {reason}"
    monkeypatch.delenv(ENVIRONMENT_PREFIX + field.upper())
    with pytest.raises(ConfigurationError) as refused:
        load_settings({field: blank}, str(config_file))
    assert str(refused.value) == f"{flag_name(field)}: {reason}"


def test_an_empty_variable_is_refused_beside_its_flag_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIDREAM_STORE", "")
    with pytest.raises(ConfigurationError, match=r"^HIDREAM_STORE: is empty; leave it out"):
        load_settings({"store": "postgresql+asyncpg://host/jobs"}, None)


def test_an_empty_variable_of_the_bucket_is_refused_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "")
    assert load_settings({"artifacts": "file:///images"}, None).artifacts == "file:///images"
    with pytest.raises(ConfigurationError, match=r"^AWS_ENDPOINT_URL: is empty; leave it out"):
        load_settings({"artifacts": "s3://bucket/prefix"}, None)


def test_an_empty_config_flag_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"^--config: is empty; leave it out"):
        load_settings({}, "")


PATHS = ("model_path", "extra_model_path", "data_dir", "tokens_file", "tls_key", "log_file")


@pytest.mark.parametrize("field", PATHS)
@pytest.mark.parametrize("name", ODD_FILE_NAMES, ids=ascii)
def test_every_name_of_a_file_is_taken_as_it_is(
    field: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert getattr(load_settings({field: name}, None), field) == Path(name)
    monkeypatch.setenv(ENVIRONMENT_PREFIX + field.upper(), name)
    assert getattr(load_settings({}, None), field) == Path(name)


@pytest.mark.parametrize("name", ODD_FILE_NAMES, ids=ascii)
def test_a_config_file_may_have_any_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).write_text("max_streams = 7\ndata_dir = 'relative'", encoding="utf-8")
    settings = load_settings({}, name)
    assert (settings.max_streams, settings.data_dir) == (7, Path("relative"))


@pytest.mark.parametrize("field", PATHS)
def test_a_tilde_that_no_shell_expanded_is_refused_and_such_a_name_has_a_way(field: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        load_settings({field: "~/hidream"}, None)
    assert str(refused.value) == (
        f"{flag_name(field)}: '~/hidream': only a shell expands ~; "
        "write the whole path, or ./~ for such a name"
    )
    assert getattr(load_settings({field: "./~x"}, None), field) == Path("~x")


def test_a_tilde_in_the_name_of_the_config_file_is_no_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~x").write_text("max_streams = 7", encoding="utf-8")
    assert load_settings({}, "./~x").max_streams == 7


def test_a_path_that_no_file_can_have_is_refused(tmp_path: Path) -> None:
    config_file = tmp_path / "hidream.toml"
    config_file.write_text('data_dir = "a\\u0000b"', encoding="utf-8")
    with pytest.raises(ConfigurationError, match=r"^data_dir .*'a\\x00b' is no path$"):
        load_settings({}, str(config_file))


def test_variables_that_look_like_settings_are_told_with_the_one_that_may_be_meant() -> None:
    names = ["HIDREAM_STROE", "HIDREAM_PORT", "HIDREAM_TOKEN", "HIDREAM_STORE", "hidream_data_dir", "HOME"]
    assert describe_unknown_variables(names) == (
        "no settings, and ignored: HIDREAM_PORT, HIDREAM_STROE (did you mean HIDREAM_STORE?)"
    )
    assert describe_unknown_variables(["HIDREAM_STORE", "HIDREAM_HTTP_LISTEN", *VARIABLES_OF_CLIENTS]) is None


def test_the_variables_of_the_clients_are_known_to_the_server() -> None:
    of_clients = (typing.get_args(option)[1].envvar for option in vars(options).values() if is_option(option))
    assert {name for name in of_clients if name} == VARIABLES_OF_CLIENTS


def is_option(value: object) -> bool:
    return isinstance(getattr(value, "__metadata__", (None,))[0], typer.models.OptionInfo)


def test_a_level_may_be_written_in_lower_case() -> None:
    assert load_settings({"log_level": "warning"}, None).log_level == "WARNING"


def test_jobs_may_be_kept_for_longer_than_a_day() -> None:
    assert load_settings({"retention_seconds": "2592000"}, None).retention_seconds == 2_592_000
    with pytest.raises(ConfigurationError, match=r"^--retention-seconds: "):
        load_settings({"retention_seconds": "inf"}, None)


def test_settings_do_not_change_once_the_server_has_them() -> None:
    settings = load_settings({}, None)
    with pytest.raises(ValueError, match="frozen"):
        settings.max_queued_jobs = 5
