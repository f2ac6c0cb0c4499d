"""Derives the blocking `hidream.client` from `hidream.aio`; with --check fails where it differs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "clients" / "python" / "hidream"
SOURCE, DERIVED = PACKAGE / "aio.py", PACKAGE / "client.py"

REPLACEMENTS = {
    r"\A.*": '"""The client for ordinary code. `scripts/generate` derives it from `hidream.aio`."""',
    # A paragraph of a docstring.
    r"\n\n +With asyncio: (?:.+\n)*?(?=\n| *\"\"\")": "\n",
    r"\basync for (\w+) in (\w+):\n +yield \1\n": r"yield from \2\n",
    r"\b(?:async|await) ": "",
    r"\bAsync(?=Client|Connection|Generator)": "",
    r"\baclosing\b": "closing",
    r"\basyncio\b": "time",
    r"\bgrpc\.aio\.": "grpc.",
    r"\b__a(?=enter__|exit__)": "__",
    r"\bTasks\b": "Threads",
}


def derived() -> str:
    """The text of `hidream.client`."""
    text = SOURCE.read_text(encoding="utf-8")
    for pattern, replacement in REPLACEMENTS.items():
        text = re.sub(pattern, replacement, text)
    return _ruff(_ruff(text, "check", "--quiet", "--select", "I", "--fix"), "format")


def _ruff(text: str, *arguments: str) -> str:
    command = [sys.executable, "-m", "ruff", *arguments, "--stdin-filename", str(DERIVED), "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Write the file, or compare it."""
    if sys.argv[1:] == ["--check"]:
        if DERIVED.read_text(encoding="utf-8") != derived():
            sys.exit(f"{DERIVED.name} is not derived from {SOURCE.name}: run scripts/generate")
    else:
        DERIVED.write_text(derived(), encoding="utf-8")


if __name__ == "__main__":
    main()
