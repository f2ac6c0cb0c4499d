"""Prints the expressions of the dashboard as rules, so that `promtool check rules` reads them."""

from __future__ import annotations

import json
from pathlib import Path

DASHBOARD = Path(__file__).parents[1] / "deploy" / "observability" / "grafana" / "dashboards" / "hidream.json"
# What Grafana puts in the place of its variables.
VALUES = {"$__rate_interval": "1m", "$job": "hidream-grpc"}


def expressions() -> list[str]:
    """The queries of all panels, with values in the place of Grafana's variables."""
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    for name, value in VALUES.items():
        found = [expression.replace(name, value) for expression in found]
    return found


def main() -> None:
    """Print a file of rules; JSON is YAML too."""
    rules = [{"record": f"panel:{number}", "expr": text} for number, text in enumerate(expressions())]
    print(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))


if __name__ == "__main__":
    main()
