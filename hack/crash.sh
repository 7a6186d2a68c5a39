#!/usr/bin/env bash
# Runs the crash and fault tests of images and the power cuts of pools at length and prints what they tried.
# Usage: hack/crash.sh [STATES [POWER CUTS]]
set -euo pipefail
cd "$(dirname "$0")/.."

# Without the lines that tell about each history.
run() { GOGC=400 go test -count 1 -v -timeout 5h "$@" | grep --line-buffered -vE '^ *(===|--- PASS)'; }

run ./pkg/qcow2 -run '^Test(Crash|CrashOnline|Order.*|Faults.*)$' \
	-crash-states "${1:-200000}" -online-histories 200 -order-random 2000 -order-step 1 -order-share 2
run ./pkg/pool -run '^TestPowerCut$' -power-states "${2:-20000}"
