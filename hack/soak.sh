#!/usr/bin/env bash
# Lets two volumes live under load for two hours: snapshots, growing, killed workers, upgrades of the engine. Fails on an
# I/O error, lost data, an image that is not clean, and memory or descriptors that grow.
# Usage: hack/soak.sh [DURATION]
set -euo pipefail
cd "$(dirname "$0")/.."

# Direct I/O needs a file system on a disk: /tmp may be memory.
TMPDIR=$(mktemp -d /var/tmp/q2.XXXX)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
go test ./pkg/engine -count 1 -v -timeout 0 -run '^TestSoak$' -soak "${1:-2h}" |
	grep --line-buffered -E '^ *(---|FAIL|PASS|ok|panic)|_test\.go'
