#!/usr/bin/env bash
# Builds into .cache/go/bin what generates the Go stubs and the OpenAPI document, and what tests call the service with:
# grpcurl, ghz, grpc-health-probe, and the examples of clients/go; with --deploy also what checks deploy/: promtool
# and kustomize. Quick when they stand. Without Go: one line and exit 0, or exit 1 where CI is set.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$project"
give_up() {
  echo "install_go_tools: tests that need Go skip: $1" >&2
  [[ -z ${CI:-} ]] || exit 1
  exit 0
}
scripts/go.sh version >/dev/null || give_up "there is no Go"

# Pinned: another generator writes other bytes.
tools=(
  google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.11
  google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.0
  github.com/google/gnostic/cmd/protoc-gen-openapi@v0.7.1
  github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.4
  github.com/grpc-ecosystem/grpc-health-probe@v0.4.61
  github.com/bojand/ghz/cmd/ghz@v0.121.0
)
if [[ ${1:-} == --deploy ]]; then
  tools+=(
    github.com/prometheus/prometheus/cmd/promtool@v0.316.0
    sigs.k8s.io/kustomize/kustomize/v5@v5.8.1
  )
fi
# promtool without the service discovery of clouds, whose libraries are most of it. And nothing is optimized: each runs
# for moments, and promtool then takes two thirds of the time to build (216 s of CPU and not 314, on a busy machine).
tool_flags="-tags=remove_all_sd,enable_dns_sd '-gcflags=all=-N -l -dwarf=false' '-ldflags=-s -w'"
binaries="$project/.cache/go/bin"
mkdir -p "$binaries"
for tool in "${tools[@]}"; do
  stamp="$binaries/.${tool//\//_}"
  if [[ ! -e $stamp ]]; then
    echo "building $tool"
    GOFLAGS=$tool_flags scripts/go.sh install "$tool" || give_up "cannot build $tool"
    touch "$stamp"
  fi
done
for command in generate jobs; do
  scripts/go.sh -C clients/go build -o "$binaries/hidream-$command" "./cmd/$command" || give_up "cannot build clients/go"
done
