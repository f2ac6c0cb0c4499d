from __future__ import annotations

import pytest

from scripts.docstrings import complaints


@pytest.mark.parametrize(
    "text",
    [
        "Of all jobs.",
        "Never.",
        "That was asked for.",
        "As gRPC wants them.",
        "For the next call.",
        "Whoever has the job is to stop it.",
        "identify who calls.",
        "Wait for the rank who is late.",
        "B.",
    ],
)
def test_a_docstring_that_is_no_sentence_of_its_own_is_refused(text: str) -> None:
    assert list(complaints(text))


@pytest.mark.parametrize(
    "text",
    [
        "Number of readers over all jobs.",
        "As many streams as the service allows are open.",
        "For each value, whether it is true on all ranks.",
        "vae/config.json: each block but the last halves the image.",
        "Refuse a caller who brings no token.",
    ],
)
def test_a_sentence_of_its_own_is_accepted(text: str) -> None:
    assert not list(complaints(text))
