#!/usr/bin/env bash
# Unpacks PgBouncer of this Debian's packages into .cache/pgbouncer, for tests of the job store behind a
# pooler; installs nothing. Quick when it stands. Without: one line and exit 0, or exit 1 where CI is set.
set -euo pipefail
project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
target="$project/.cache/pgbouncer"
[[ ! -e $target/complete ]] || exit 0
give_up() {
  echo "install_pgbouncer: tests that need PgBouncer skip: $1" >&2
  [[ -z ${CI:-} ]] || exit 1
  exit 0
}
for command in apt-get dpkg-deb; do
  command -v "$command" >/dev/null || give_up "there is no $command"
done

echo "fetching PgBouncer"
rm -rf "$target"
mkdir -p "$target"
cd "$target"
apt-cache show pgbouncer >/dev/null 2>&1 || apt-get update -qq >/dev/null 2>&1 || give_up "cannot read the list of packages"
# Beside it the libraries that a small system lacks.
libraries=$(apt-cache depends pgbouncer | awk '$1 == "Depends:" && $2 ~ /^lib(c-ares|cares|event)/ { print $2 }')
# shellcheck disable=SC2086
apt-get download pgbouncer $libraries >/dev/null 2>&1 || give_up "cannot download it"
for package in ./*.deb; do
  dpkg-deb --extract "$package" .
done
rm ./*.deb
touch complete
