#!/usr/bin/env bash
# Fuzzes the images' code, all groups of targets at once, and prints how many inputs each has tried and what it found.
# Usage: FUZZTIME=1h hack/fuzz.sh [TARGET...]
# A finding ends its target and becomes a seed in pkg/qcow2/testdata/fuzz, which every test run tries from then on.
set -euo pipefail
cd "$(dirname "$0")/.."
targets=(FuzzRead FuzzRepair FuzzChange)
(($# == 0)) || targets=("$@")

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT
pids=()
for target in "${targets[@]}"; do
	# Not nice: a fuzzer's worker that gets no processor for ten seconds is taken for one that hangs.
	go test -run '^$' -fuzz "^$target\$" -fuzztime "${FUZZTIME:-1h}" -parallel 1 -fuzzminimizetime 2s -timeout 0 \
		./pkg/qcow2 >"$logs/$target" 2>&1 &
	pids+=($!)
done
status=0
for i in "${!targets[@]}"; do
	wait "${pids[i]}" || true # it also fails when time is up while it tries to shorten an input
	! grep -q 'Failing input' "$logs/${targets[i]}" || status=1
	echo "${targets[i]}:"
	grep -E '^fuzz: elapsed' "$logs/${targets[i]}" | tail -n 1
	grep -vE '^fuzz: elapsed' "$logs/${targets[i]}"
done
exit "$status"
