#!/usr/bin/env bash
# Installs the test extra and runs the whole suite, three files at a time; or pytest with the arguments given.
# --long: the whole suite with the tests that take long.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$project"
scripts/install.sh test
scripts/install_go_tools.sh
scripts/install_node_packages.sh
scripts/install_pgbouncer.sh
scripts/install_chromium.sh
if [[ $* == "" || $* == --long ]]; then
  # Tests of one file share servers. A third worker computes while others wait; more would starve each other.
  set -- -n 3 --dist loadfile --no-loadscope-reorder --durations=25 "$@"
fi
exec .venv/bin/python -m pytest "$@"
