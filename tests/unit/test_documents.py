"""Links in the documents lead somewhere, and the Chinese ones say what the English ones say."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from hidream_grpc.devices.device_types import NPU

REPOSITORY = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted(
    path.relative_to(REPOSITORY)
    for pattern in (
        "*.md",
        "examples/*.md",
        "docs/**/*.md",
        "deploy/**/*.md",
        "clients/*/README.md",
        "scripts/**/*.md",
    )
    for path in REPOSITORY.glob(pattern)
)
TWINS = [
    pytest.param("README.md", "README.zh.md", id="README"),
    pytest.param("docs/migrating.md", "docs/migrating.zh.md", id="migrating"),
]


def text_of(document: str | Path) -> str:
    return (REPOSITORY / document).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to the headings of a document: `c` and `c-1` for C# and C++."""
    num_of_name: Counter[str] = Counter()
    found = set()
    for heading in re.findall(r"^#+ +(.+)$", text, re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(f"{name}-{num_of_name[name]}" if num_of_name[name] else name)
        num_of_name[name] += 1
    return found


def own_links(text: str) -> Iterator[tuple[str, str]]:
    """Path and anchor of each link that does not leave the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_every_link_of_a_document_leads_somewhere(document: Path) -> None:
    for path, anchor in own_links(text_of(document)):
        target = (REPOSITORY / document).parent / path if path else REPOSITORY / document
        assert target.exists(), f"{path} is not there"
        if anchor:
            assert anchor in anchors(text_of(target)), f"{path} has no heading #{anchor}"


def table_rows(text: str) -> list[list[str]]:
    """The words in code of each row of each table, whatever the prompts in them are."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return [sorted(re.sub(r'"[^"]*"', '""', code) for code in re.findall(r"`([^`]+)`", row)) for row in rows]


@pytest.mark.parametrize(("english", "chinese"), TWINS)
def test_a_chinese_document_names_what_its_english_twin_names_row_by_row(english: str, chinese: str) -> None:
    assert table_rows(text_of(chinese)) == table_rows(text_of(english))


@pytest.mark.parametrize(("english", "chinese"), TWINS)
def test_a_chinese_document_links_to_what_its_english_twin_links_to(english: str, chinese: str) -> None:
    names = {Path(english).name, Path(chinese).name}
    linked = [{*own_links(text_of(document))} for document in (english, chinese)]
    of_english, of_chinese = ({link for link in links if link[0] not in names} for links in linked)
    assert of_chinese == of_english


def test_every_variable_that_ranks_on_npus_get_is_documented_with_its_value() -> None:
    rows = re.findall(
        r"^\| `([A-Z_]+)` \| (`[^`]+`|number of ranks) \|", text_of("deploy/README.md"), re.MULTILINE
    )
    num_ranks = 4
    documented = {name: value.strip("`").replace("number of ranks", str(num_ranks)) for name, value in rows}
    assert documented == NPU.environment(num_ranks)


def test_each_decision_has_a_number_of_its_own_which_its_title_repeats() -> None:
    decisions = sorted((REPOSITORY / "docs/decisions").glob("*.md"))
    numbers = [int(path.name[:4]) for path in decisions]
    assert numbers == list(range(1, len(decisions) + 1))
    for number, path in zip(numbers, decisions, strict=True):
        assert path.read_text(encoding="utf-8").startswith(f"# {number}. "), path.name
