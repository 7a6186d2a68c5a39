#!/usr/bin/env bash
# Runs the crash and fault tests at length and prints what they tried.
# Usage: hack/crash.sh [STATES]
set -euo pipefail
cd "$(dirname "$0")/.."

# Without the lines that tell about each history.
GOGC=400 go test ./pkg/qcow2 -count 1 -v -timeout 5h -run '^Test(Crash|CrashOnline|Order.*|Faults.*)$' \
	-crash-states "${1:-200000}" -online-histories 200 -order-random 2000 -order-share 2 | grep --line-buffered -vE '^ *(===|--- PASS)'
