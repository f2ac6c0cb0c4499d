#!/usr/bin/env bash
# Generates an image from nothing: installs, starts the service with its built-in demo model on the CPU,
# asks it over gRPC, and stops it again.  demo.sh ["a prompt"] [options of `hidream generate`]
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
prompt=${1:-a red circle on a blue background}
shift || true
"$project/scripts/install.sh"
binaries="$project/.venv/bin"
mkdir -p "$project/logs"
log="$project/logs/demo_$(date +%Y%m%d_%H%M%S).log"
# Not that of a server that is used in earnest: its jobs would be drawn here, too.
data=$(mktemp -d)

env -u HIDREAM_MODEL_PATH -u HIDREAM_EXTRA_MODEL_PATH -u HIDREAM_STORE -u HIDREAM_ARTIFACTS \
  "$binaries/hidream-grpc" serve \
  --device-type cpu --listen 127.0.0.1:0 --data-dir "$data" --log-level INFO 2>"$log" &
server=$!
trap 'kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; rm -rf "$data"' EXIT

echo "starting the service; its log is $log"
until address=$(grep -som1 'listening on [^,]*' "$log"); do
  if ! kill -0 "$server" 2>/dev/null; then
    tail -n 3 "$log" >&2
    exit 1
  fi
  sleep 0.1
done
address=${address#listening on }
"$binaries/hidream" health --address "$address" --wait 300 >/dev/null &
waiting=$!
# A server that ends while it loads is not waited for.
if ! wait -n "$server" "$waiting"; then
  kill "$waiting" 2>/dev/null || true
  tail -n 3 "$log" >&2
  exit 1
fi

picture="$PWD/demo.png"
"$binaries/hidream" generate "$prompt" --address "$address" --out "$picture" "$@"
cat <<END

To keep a server running:  $project/scripts/start_service.sh --demo
and to ask it:             $binaries/hidream generate "$prompt" --address localhost:8088
END
