from __future__ import annotations

import logging
from typing import Any

import pytest

from hidream_grpc.engine.group.config import GroupConfig
from hidream_grpc.engine.group.rank_group import RankGroup
from hidream_grpc.errors import ConfigurationError
from hidream_grpc.model.checkpoint.demo import demo_checkpoint_path
from hidream_grpc.model.checkpoint.description import CheckpointDescription, describe_checkpoint
from hidream_grpc.server.configuration import group_config, log_choices
from hidream_grpc.server.model_folders import ModelFolders
from hidream_grpc.settings import Settings, load_settings

FOLDERS = ModelFolders(demo_checkpoint_path(), None)


@pytest.fixture(scope="module")
def demo() -> CheckpointDescription:
    return describe_checkpoint(FOLDERS.model, None)


def settings(**flags: Any) -> Settings:
    return load_settings({"device_type": "cpu", **flags}, None)


def config(demo: CheckpointDescription, **flags: Any) -> GroupConfig:
    return group_config(settings(**flags), FOLDERS, demo)


@pytest.mark.parametrize(
    ("flags", "layout"),
    [
        ({}, "cfg=2"),
        ({"devices": "0-3"}, "tp=4"),
        ({"devices": "0-3", "layout": "table"}, "tp=4"),
        ({"layout": "table"}, "cfg=2"),
        ({"devices": "0-3", "layout": "auto"}, "cfg=2,sp=2"),
        ({"devices": "0-3", "layout": "throughput"}, "cfg=2,dp=2"),
        ({"layout": "auto"}, "cfg=2"),
        ({"devices": "0-3", "layout": "ep=2"}, "ep=2"),
    ],
    ids=str,
)
def test_a_word_chooses_a_layout_and_no_word_means_what_it_meant(
    flags: dict[str, str], layout: str, demo: CheckpointDescription
) -> None:
    assert str(config(demo, **flags).layout) == layout


def test_a_word_that_is_none_is_told_those_that_are(demo: CheckpointDescription) -> None:
    with pytest.raises(ConfigurationError, match="or name one of table, auto, throughput"):
        config(demo, layout="fastest")


def test_the_log_names_what_auto_would_take_where_that_is_faster(
    demo: CheckpointDescription, caplog: pytest.LogCaptureFixture
) -> None:
    def lines(**flags: str) -> list[str]:
        caplog.clear()
        group = RankGroup(config(demo, **flags))
        with caplog.at_level(logging.INFO):
            log_choices(settings(**flags), FOLDERS, demo, group)
        return caplog.messages

    (line,) = lines(devices="0-3")
    assert line.startswith("layout tp=4; --layout auto would take cfg=2,sp=2, where each device has ")
    assert line.endswith(" times as fast for one image")
    assert lines(devices="0-1", layout="cfg=2") == []
    assert lines(devices="0-3", layout="auto") == []
