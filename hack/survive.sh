#!/usr/bin/env bash
# Kills the workers of a volume 200 times at random moments, and changes the engine 50 times in each way, under load that
# checks what it reads, with snapshots. Prints how long the longest request took. Then a tenth of that with the race detector.
# Usage: hack/survive.sh [KILLS [CHANGES]]
set -euo pipefail
cd "$(dirname "$0")/.."

# Direct I/O needs a file system on a disk: /tmp may be memory.
TMPDIR=$(mktemp -d /var/tmp/q2.XXXX)
export TMPDIR
trap 'rm -rf "$TMPDIR"' EXIT
survive() {
	go test ./pkg/engine -count 1 -v -timeout 2h -run '^TestSurvive' "$@" |
		grep --line-buffered -E '^ *(---|FAIL|PASS|ok|panic)|_test\.go|DATA RACE'
}
survive -worker-kills "${1:-200}" -engine-changes "${2:-50}"
echo 'With the race detector:'
survive -race -worker-kills $((${1:-200} / 10)) -engine-changes $((${2:-50} / 10))
