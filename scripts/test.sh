#!/usr/bin/env bash
# Installs the test extra and runs the whole suite, four files at a time; or pytest with the arguments given.
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
  # Tests of one file share servers. Two cores are busy with four workers, since tests wait, too.
  set -- -n 4 --dist loadfile --no-loadscope-reorder --durations=25 "$@"
fi
exec .venv/bin/python -m pytest "$@"
