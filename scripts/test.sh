#!/usr/bin/env bash
# Installs the test extra and runs the whole suite; arguments go to pytest.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$project"
scripts/install.sh test
scripts/install_go_tools.sh
exec .venv/bin/python -m pytest "$@"
