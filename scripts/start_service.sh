#!/usr/bin/env bash
# Checks its flags and becomes the server: signals sent to this process reach it.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage: scripts/start_service.sh [OPTIONS] [-- SERVER_OPTIONS...]

Starts the HiDream gRPC service. Logs go to the terminal and to
logs/hidream_YYYYMMDD_HHMMSS.log under the project path.

  -m, --model-path FOLDER        HiDream-I1 in diffusers format (default /data/HiDream-I1-Full)
  -e, --extra-model-path FOLDER  Llama-3.1-8B-Instruct (default /data/Llama-3.1-8B-Instruct; may be
                                 absent when the model folder holds its own text_encoder_4)
      --demo                     the small built-in model, whatever HIDREAM_MODEL_PATH says
  -p, --project-path FOLDER      folder to run from (default: the project this script is part of)
  -d, --devices LIST             one rank each, such as 0,1,2,3 or 0-3 (default 0, or the first
                                 --device-count); on a CPU any numbers, one a rank
  -c, --device-count NUMBER      the first NUMBER devices; with --devices it is checked against them
  -t, --device-type TYPE         auto, npu, cuda or cpu (default auto: the first that is present)
      --host HOST                address to listen on (default 0.0.0.0)
      --port PORT                TCP port to listen on (default 8088; 0 lets the system choose)
      --http-port PORT           also start the HTTP bridge, hidream-http, on this port of the host; it ends
                                 with the server (HIDREAM_HTTP_MAX_BODY_BYTES and the like are its settings)
      --log-level LEVEL          DEBUG, INFO, WARNING or ERROR (default INFO)
      --log-format FORMAT        text or json (default text)
      --dry-run                  check the flags, show the command, start nothing
  -h, --help                     show this text
      --                         what follows goes to the server as it is

Python is .venv/bin/python of the project path when there is one, else that of the project this script is
part of, else python3 from PATH. The
environment is passed on as it is: HIDREAM_DEVICES, HIDREAM_LISTEN and the server's other variables hold
where no flag is given, and the server adds its devices' defaults where nothing is set.
TEXT
}

fail() {
  echo "start_service: $1" >&2
  exit 2
}

require_not_empty() { # variables
  local name
  for name; do
    [[ -z ${!name+set} || -n ${!name//[[:space:]]/} ]] || fail "$name: is empty; leave it out to have its default"
  done
}

require_folder() { # flag, folder
  [[ -d $2 ]] || fail "$1: $2: no such folder"
}

absolute() {
  (cd "$1" && pwd)
}

require_not_empty HIDREAM_DEVICES HIDREAM_MODEL_PATH HIDREAM_EXTRA_MODEL_PATH HIDREAM_LISTEN

model_path=
extra_model_path=
demo=false
project_path=
# The variables of the server are defaults here too: a flag goes before a variable.
devices=${HIDREAM_DEVICES:-}
device_count=
host=
port=
http_port=
dry_run=false
passed_on=()
log_flags=()

while (($#)); do
  flag=$1
  shift
  case $flag in
    --?*=*)
      set -- "${flag%%=*}" "${flag#*=}" "$@"
      continue
      ;;
    -m | --model-path | -e | --extra-model-path | -p | --project-path | -d | --devices | -c | \
      --device-count | -t | --device-type | --host | --port | --http-port | --log-level | --log-format)
      [[ -n ${1:-} && $1 != -* ]] || fail "$flag: needs a value"
      value=$1
      shift
      ;;
  esac
  case $flag in
    -m | --model-path) model_path=$value ;;
    -e | --extra-model-path) extra_model_path=$value ;;
    --demo) demo=true ;;
    -p | --project-path) project_path=$value ;;
    -d | --devices) devices=$value ;;
    -c | --device-count) device_count=$value ;;
    -t | --device-type) passed_on+=(--device-type "$value") ;;
    --host) host=$value ;;
    --port) port=$value ;;
    --http-port) http_port=$value ;;
    --log-level | --log-format) log_flags+=("$flag" "$value") ;;
    --dry-run) dry_run=true ;;
    -h | --help)
      usage
      exit 0
      ;;
    --)
      passed_on+=("$@")
      break
      ;;
    *) fail "$flag: unknown flag (--help shows all)" ;;
  esac
done

own_project=$(absolute "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/..")
project_path=${project_path:-$own_project}
require_folder --project-path "$project_path"
project_path=$(absolute "$project_path")

model=()
if $demo; then
  [[ -z $model_path$extra_model_path ]] ||
    fail "--demo: has a model of its own; leave out --model-path and --extra-model-path"
  # Without its flag the server would take the model from its environment.
  unset HIDREAM_MODEL_PATH HIDREAM_EXTRA_MODEL_PATH
else
  model_path=${model_path:-${HIDREAM_MODEL_PATH:-/data/HiDream-I1-Full}}
  require_folder --model-path "$model_path"
  model+=(--model-path "$(absolute "$model_path")")
  if [[ -n $extra_model_path || ! -d $model_path/text_encoder_4 ]]; then
    extra_model_path=${extra_model_path:-${HIDREAM_EXTRA_MODEL_PATH:-/data/Llama-3.1-8B-Instruct}}
    require_folder --extra-model-path "$extra_model_path"
    model+=(--extra-model-path "$(absolute "$extra_model_path")")
  fi
fi

require_port() { # flag, port
  if [[ ! $2 =~ ^[0-9]{1,5}$ ]] || ((10#$2 > 65535)); then
    fail "$1: $2 is no port: 0 to 65535"
  fi
}

listen=()
if [[ -n $host$port || -z ${HIDREAM_LISTEN:-} ]]; then
  port=${port:-8088}
  require_port --port "$port"
  host=${host:-0.0.0.0}
  [[ $host != *:* || $host == \[*\] ]] || host="[$host]"
  listen=(--listen "$host:$port")
fi

bridge=()
trusted=()
if [[ -n $http_port ]]; then
  require_port --http-port "$http_port"
  flags=" ${passed_on[*]-} "
  if [[ -z ${HIDREAM_HTTP_SERVER:-} && $flags =~ \ --listen[\ =] ]]; then
    fail "--listen: give --host and --port instead, or set HIDREAM_HTTP_SERVER to where the bridge finds the server"
  fi
  if [[ -z ${HIDREAM_HTTP_SERVER_CA:-} && ( -n ${HIDREAM_TLS_CERTIFICATE:-} || $flags =~ \ --tls-certificate[\ =] ) ]]; then
    fail "--http-port: set HIDREAM_HTTP_SERVER_CA to the authority of --tls-certificate, for the bridge's calls"
  fi
  address=${listen[1]:-$HIDREAM_LISTEN}
  host=${address%:*}
  [[ ${address##*:} != 0 ]] || fail "--http-port: needs a --port other than 0, to find the server"
  bridge=(-m hidream_http --parent-pid $$ --listen "$host:$http_port" ${log_flags[@]+"${log_flags[@]}"})
  if [[ $host == 0.0.0.0 || $host == "[::]" ]]; then
    address=localhost:${address##*:}
  fi
  [[ -n ${HIDREAM_HTTP_SERVER:-} ]] || bridge+=(--server "$address")
  # Otherwise all callers of the bridge would be one caller, with the share of one.
  if [[ -z ${HIDREAM_TRUSTED_PROXIES:-} && $flags != *" --trusted-proxies"* ]]; then
    proxies=127.0.0.1,::1
    bare_host=${host//[][]/}
    # Calls to an address of this machine come from the same address.
    if [[ $bare_host =~ ^[0-9.]+$|: && ! $bare_host =~ ^(0\.0\.0\.0|127\.0\.0\.1|::|::1)$ ]]; then
      proxies+=,$bare_host
    fi
    trusted=(--trusted-proxies "$proxies")
  fi
  if [[ -n ${HIDREAM_HTTP_TLS_CLIENT_CA:-} && -z ${HIDREAM_TRUSTED_BRIDGES:-} &&
    " ${passed_on[*]-} " != *" --trusted-bridges"* ]]; then
    trusted+=(--trusted-bridges "127.0.0.1,::1")
  fi
fi

cd "$project_path"
places=$project_path
[[ $own_project == "$project_path" ]] || places+=" or $own_project"
python=$project_path/.venv/bin/python
[[ -x $python ]] || python=$own_project/.venv/bin/python
[[ -x $python ]] || python=$(command -v python3) || fail "no .venv in $places, and no python3 on PATH"

if [[ -n $device_count && ! $device_count =~ ^[1-9][0-9]{0,3}$ ]]; then
  fail "--device-count: $device_count is no number of devices"
fi
if [[ -z $devices ]]; then
  devices=0
  [[ ${device_count:-1} == 1 ]] || devices=0-$((device_count - 1))
elif [[ -n $device_count ]]; then
  num_devices=$("$python" -c '
import sys
from hidream_grpc.devices.detect import parse_devices
from hidream_grpc.errors import StartupError
try:
    print(len(parse_devices(sys.argv[1])))
except StartupError as error:
    sys.exit(f"start_service: {error}")
' "$devices") || exit 2
  [[ $device_count == "$num_devices" ]] ||
    fail "--device-count: $device_count, but --devices $devices names $num_devices"
fi

command=(
  "$python" -m hidream_grpc serve ${model[@]+"${model[@]}"} --devices "$devices" ${listen[@]+"${listen[@]}"}
  --log-file "$project_path/logs/hidream_$(date +%Y%m%d_%H%M%S).log" ${log_flags[@]+"${log_flags[@]}"}
  ${trusted[@]+"${trusted[@]}"} ${passed_on[@]+"${passed_on[@]}"}
)
if $dry_run; then
  printf 'cd %q\n' "$project_path"
  if ((${#bridge[@]})); then
    printf '%q ' "$python" "${bridge[@]}"
    echo '&'
  fi
  printf exec
  printf ' %q' "${command[@]}"
  echo
  exit 0
fi
mkdir -p logs 2>/dev/null || fail "--project-path: cannot create $project_path/logs"
"$python" -c 'import sys; from importlib.util import find_spec; sys.exit(not all(map(find_spec, sys.argv[1:])))' \
  hidream_grpc hidream grpc torch ||
  fail "hidream-grpc is not installed for $python, and there is no other .venv in $places: run $own_project/scripts/install.sh"
if ((${#bridge[@]})); then
  "$python" -c 'import hidream_http' 2>/dev/null ||
    fail "hidream-http is not installed for $python: run $own_project/scripts/install.sh"
  # It says on stdout where it listens, and why it cannot on stderr.
  exec {bridge_output}< <(exec "$python" "${bridge[@]}" </dev/null)
  read -r http_url <&"$bridge_output" || exit 2
  exec {bridge_output}<&-
  http_url=${http_url/0.0.0.0/localhost}
  echo "start_service: open ${http_url/\[::\]/localhost}" >&2
fi
exec "${command[@]}"
