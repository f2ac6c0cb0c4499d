#!/usr/bin/env bash
# Makes .venv and installs the service, its client and its HTTP bridge into it: install.sh [EXTRA]. At once when nothing
# has changed since. Needs Python 3.11 or newer and a package index, nothing else.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$project"
extra=${1:-}
venv="$project/.venv"
# An installation with an extra serves those who need none.
wanted=$(cat pyproject.toml clients/python/pyproject.toml clients/http/pyproject.toml | sha256sum | cut -d' ' -f1)
for stamp in "$venv/installed-$extra" "$venv"/installed-*; do
  if [[ -x $venv/bin/python && -f $stamp && ($stamp == "$venv/installed-$extra" || -z $extra) && $(<"$stamp") == "$wanted" ]]; then
    exit 0
  fi
done

find_python() {
  local candidate
  for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
    if command -v "$candidate" >/dev/null 2>&1 &&
      "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  echo "install.sh: Python 3.11 or newer is needed, and none is on PATH" >&2
  return 1
}

# Also anew when its interpreter is gone, or when it was left half made, without pip.
if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  echo "making $venv"
  "$python" -m venv --clear "$venv"
fi
echo "installing hidream-grpc (the first time takes a few minutes: torch is large)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  --editable clients/python --editable clients/http --editable ".${extra:+[$extra]}"
echo "$wanted" >"$venv/installed-$extra"
