"""Refuses docstrings that are no sentence of their own."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PROJECT = Path(__file__).parent.parent
FOLDERS = ("clients/http/hidream_http", "clients/python/hidream", "hidream_grpc", "scripts", "tests")
GENERATED = PROJECT / "clients" / "python" / "hidream" / "v1"

# Such a word leans on the name, which an editor does not show; "As many" and "For each" do not.
_FRAGMENT = re.compile(
    r"(Also|Always|As(?! m)|By|For(?! e)|Never|Nobody|Of|Once|Since|Still|Than|Th(at|ose)|Until|Who\w*)\b"
)
_THINGS = (
    "child|engine|file|group|job|loop|parent|process|rank|replica|request|server|stream|task|worker|zygote"
)
_PERSON = re.compile(rf"\b({_THINGS})(s|es|ren)?,? who\b", re.IGNORECASE)


def complaints(text: str) -> Iterator[str]:
    """What is wrong with one docstring."""
    if re.match(r"[a-z]+\s", text):
        yield "begins with a small letter"
    if fragment := _FRAGMENT.match(text):
        yield f'begins in mid-sentence, with "{fragment[0]}"'
    if len(text.split()) == 1:
        yield "is one word"
    if person := _PERSON.search(text):
        yield f'"{person[0]}": it is "which" or "that"'


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every string that is a statement: docstrings, also those of attributes."""
    for node in ast.walk(tree):
        match node:
            case ast.Expr(value=ast.Constant(value=str(text))) if text.strip():
                yield node.lineno, text.strip()


def main() -> None:
    """Print every complaint as `file:line: text`; exit code 1 where there is one."""
    given = [Path(path).resolve() for path in sys.argv[1:]] or [PROJECT / path for path in FOLDERS]
    files = [file for path in given for file in ([path] if path.is_file() else sorted(path.rglob("*.py")))]
    found = [
        f"{file.relative_to(PROJECT)}:{number}: {complaint}: {text.splitlines()[0]}"
        for file in files
        if GENERATED not in file.parents
        for number, text in docstrings(ast.parse(file.read_text(encoding="utf-8")))
        for complaint in complaints(text)
    ]
    for line in found:
        print(line)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
