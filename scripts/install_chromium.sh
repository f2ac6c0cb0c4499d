#!/usr/bin/env bash
# Unpacks Chromium of this Debian's packages into .cache/chromium, for tests of the page; installs nothing.
# Quick when it stands. Without: one line and exit 0, or exit 1 where CI is set.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target="$project/.cache/chromium"
[[ ! -e $target/complete ]] || exit 0
give_up() {
  echo "install_chromium: tests of the page skip: $1" >&2
  [[ -z ${CI:-} ]] || exit 1
  exit 0
}
for command in apt-get dpkg-deb; do
  command -v "$command" >/dev/null || give_up "there is no $command"
done

echo "fetching Chromium"
rm -rf "$target"
mkdir -p "$target"
cd "$target"
# Beside it every library that this system lacks: those that an installation would add.
fetch() {
  local packages
  packages=$(apt-get install --simulate --reinstall --no-install-recommends chromium | awk '$1 == "Inst" { print $2 }')
  # shellcheck disable=SC2086
  [[ -n $packages ]] && apt-get download $packages
}
# A list of packages that is missing or old is fetched first.
fetch >/dev/null 2>&1 || { apt-get update -qq && fetch; } >/dev/null 2>&1 || give_up "cannot download it"
for package in ./*.deb; do
  dpkg-deb --extract "$package" .
done
rm ./*.deb
touch complete
