import pytest

from hidream.batch_lines import BatchLines, InvalidLinesError, LineViolation
from hidream.command_line import error_lines
from hidream.errors import FieldViolation, InvalidArgumentError
from hidream.requests import submit_request


def violations(*lines: str) -> list[tuple[int, str]]:
    with pytest.raises(InvalidLinesError) as caught:
        BatchLines.parse([line.encode() for line in lines])
    return [(violation.line_number, violation.field) for violation in caught.value.violations]


def test_every_line_becomes_the_request_that_it_says() -> None:
    batch = BatchLines.parse(
        [
            '{"prompt": "ein Fuchs für dich", "seed": 7, "width": 512, "height": 768}\n'.encode(),
            b"  \n",
            b'{"prompt": "b", "priority": "HIGH", "output_format": "WEBP", "labels": {"set": "x"}}',
        ]
    )
    assert batch.requests == (
        submit_request("ein Fuchs für dich", seed=7, width=512, height=768),
        submit_request("b", priority="HIGH", output_format="WEBP", labels={"set": "x"}),
    )
    assert batch.line_numbers == (1, 3)


def test_a_line_names_its_model_or_has_that_of_the_batch() -> None:
    lines = [b'{"prompt": "a", "model": "dev"}', b'{"prompt": "b"}', b'{"prompt": "c", "model": null}']
    assert BatchLines.parse(lines, default_model="full").requests == (
        submit_request("a", model="dev"),
        submit_request("b", model="full"),
        submit_request("c", model="full"),
    )
    assert not BatchLines.parse(lines).requests[1].HasField("model")


def test_null_is_the_servers_default() -> None:
    [request] = BatchLines.parse([b'{"prompt": "a", "seed": null}']).requests
    assert request == submit_request("a")


@pytest.mark.parametrize(
    ("line", "field"),
    [
        pytest.param('{"prompt": "a", "seed": "seven"}', "seed", id="text for a number"),
        pytest.param(f'{{"prompt": "a", "seed": {2**64}}}', "seed", id="a number that no message can carry"),
        pytest.param('{"prompt": "a", "steps": 3}', "steps", id="an unknown field"),
        pytest.param('{"prompt": "a", "detached": true}', "detached", id="a field of generate only"),
        pytest.param('{"prompt": "a", "output_format": "gif"}', "output_format", id="an unknown format"),
        pytest.param('{"prompt": "a", "labels": {"a": 1}}', "labels", id="a label that is no text"),
        pytest.param('{"prompt": "a", "labels": "b"}', "labels", id="labels that are no object"),
        pytest.param('{"prompt": "a", "seed": 1, "seed": 2}', "seed", id="a field twice"),
        pytest.param('{"seed": 1}', "prompt", id="no prompt"),
        pytest.param('["a"]', "", id="no object"),
        pytest.param('{"prompt": ', "", id="no JSON"),
    ],
)
def test_a_bad_line_is_named_by_its_number_and_field(line: str, field: str) -> None:
    assert violations('{"prompt": "fine"}', "", line) == [(3, field)]


def test_everything_that_is_wrong_is_named_at_once() -> None:
    assert violations('{"seed": "x"}', '{"prompt": "a"}', "no") == [(1, "prompt"), (1, "seed"), (3, "")]


def test_a_line_that_is_no_utf_8_is_named() -> None:
    with pytest.raises(InvalidLinesError) as caught:
        BatchLines.parse([b"\xff"])
    assert error_lines(caught.value, "a:1") == ["line 1: is not UTF-8"]


def test_what_the_server_refuses_is_told_by_line_too() -> None:
    batch = BatchLines.parse([b"", b'{"prompt": "a"}', b"", b'{"prompt": "b", "width": 65}'])
    refusal = InvalidArgumentError.from_violations(
        (FieldViolation("requests[1].spec.width", "must be a multiple of 16"),)
    )
    refused = batch.refused(refusal)
    assert isinstance(refused, InvalidLinesError)
    assert refused.violations == (LineViolation(4, "width", "must be a multiple of 16"),)
    assert error_lines(refused, "a:1") == ["line 4, width: must be a multiple of 16"]


def test_a_refusal_of_the_whole_batch_stays_as_it_is() -> None:
    refusal = InvalidArgumentError.from_violations((FieldViolation("requests", "is required"),))
    assert BatchLines.parse([]).refused(refusal) is refusal
