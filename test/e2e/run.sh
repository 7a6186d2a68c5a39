#!/usr/bin/env bash
# Starts a cluster, runs the tests on it, takes it down, and fails if anything is left.
# Usage: run.sh [FLAG OF go test...]
set -euo pipefail
cd "$(dirname "$0")"
. cluster/env.sh

# Another run on this machine is waited for: it has the names that this one needs. flock, not what is started, has the lock.
lock=/run/csi-qcow2-e2e.lock
[[ ${E2E_LOCK-} == "$lock" ]] || E2E_LOCK=$lock exec flock --close "$lock" ./run.sh "$@"

# Those that may be the cluster's: of a node's disk, of a volume, and kubelet's.
loops() { losetup --noheadings --raw --output NAME,BACK-FILE | { grep -E "$STATE|/csiq:pvc-|/kubernetes.io/" || true; } | sort; }

leftovers() {
	ip netns | grep -E '^q2e-' | sed 's/^/network namespace /'
	grep -F "$STATE" /proc/self/mountinfo | cut -d' ' -f5 | sed 's/^/mount /'
	loops | comm -13 "$before" - | sed 's/^/loop device /'
	find /sys/fs/cgroup -maxdepth 2 -name 'q2e-*' | sed 's/^/cgroup /'
	local exe
	for exe in /proc/[0-9]*/exe; do
		[[ $(readlink "$exe") != "$CACHE"/* ]] || echo "process $exe"
	done
	[[ ! -e $STATE ]] || echo "directory $STATE"
} 2>/dev/null || true

finish() {
	local status=$? left
	if ((status)) && [[ -d $STATE/log ]]; then
		cluster/logs.sh || true
		../../hack/failures.awk "$output" || true
	fi
	cluster/down.sh || status=1
	left=$(leftovers)
	rm -f "$before" "$output"
	if [[ $left ]]; then
		printf 'The tests left behind:\n%s\n' "$left" >&2
		status=1
	fi
	exit "$status"
}
before=$(mktemp)
output=$(mktemp)
trap finish EXIT
cluster/down.sh # of an earlier run that was killed
loops >"$before"

CGO_ENABLED=0 GOFLAGS=-buildvcs=false go test -c -trimpath -o "$CACHE/e2e.test" .
cluster/up.sh 2
STATE=$STATE KUBECONFIG=$KUBECONFIG_ADMIN in_netns "$CONTROL" "$CACHE/e2e.test" -test.v -test.parallel 16 -test.timeout 30m "$@" 2>&1 |
	tee "$output"
