#!/usr/bin/env bash
# Runs every test and checks that none of them left a loop device or a process behind, or (hack/alone.sh) a mount.
# Usage: hack/test.sh [PACKAGE...]
set -euo pipefail
cd "$(dirname "$0")/.."
packages=("${@:-./...}")

# The tests' temporary files: on a disk (/tmp may be memory), with a short name (the path of a socket ends
# at 107 bytes). The tests' processes inherit the variable, so they can be told from all others.
tmp=$(mktemp -d /var/tmp/q2.XXXX)
trap 'rm -rf "$tmp" "$tmp".*' EXIT

loops() { losetup --noheadings --output NAME,BACK-FILE | sort; }
processes() {
	local environ
	for environ in /proc/[0-9]*/environ; do
		if grep -qzx "TMPDIR=$tmp" "$environ" 2>/dev/null; then
			echo "${environ//[!0-9]/} $(tr '\0' ' ' <"${environ%environ}cmdline")"
		fi
	done
}
leftovers() {
	comm -13 <(echo "$loops_before") <(loops) | sed 's/^/loop device /'
	processes | sed 's/^/process /'
}
loops_before=$(loops)

list=$(go list "${packages[@]}")
export CSI_SANITY_REPORT=$tmp.sanity # csi-sanity's count, which go test hides when all is well
status=0
# run PATTERN [FLAG...] tests the packages that match, one after the other.
run() {
	local matched
	mapfile -t matched < <(grep -E "$1" <<<"$list")
	shift
	((${#matched[@]})) || return 0
	TMPDIR=$tmp go test -p 1 -exec "$PWD/hack/alone.sh" -timeout 15m "$@" "${matched[@]}" 2>&1 | tee -a "$tmp.log" || status=1
}

# Two at a time, of which each takes about half of the whole: the machine is small and the tests start processes of their own.
# The race detector is for what runs concurrently. The command line's tests run the program often, each time for one
# thing, and the histories of images are long and have one thread: with the detector both take several times as long.
images='/pkg/qcow2(/|$)'
concurrent='Concurren|Online'
engine='/pkg/engine(/|$)'
loads='^Test(Survive(Workers|Engines)|Soak|SnapshotsWhileWriting)' # the detector would watch those who write: make survive has it
driver='/pkg/driver(/|$)'
stories='^Test(.*Formatted|Hostile|Messages|.*OnFullPool|Preallocation|Mount|Stage|Linked|TwoStaging|BlockLife|Losetup|Reader)' # one call at a time
{
	run "$images" -skip "$concurrent"
	run "$engine" -race -skip "$loads"
	run "$engine" -run "$loads"
	exit "$status"
} &
beside=$! # which each process substitution changes
run /cmd/
run "$images" -race -run "$concurrent"
# Not at once: the detector would take for synchronisation what the check of the locks' order does.
run "$images" -tags lockorder -run "$concurrent|LockOrder"
run "$driver" -race -skip "$stories"
run "$driver" -run "$stories"
list=$(grep -vE "/cmd/|$images|$engine|$driver" <<<"$list" || true)
run . -race
wait "$beside" || status=1

# The kernel frees a loop device a moment after its last user has gone.
for _ in {1..20}; do
	left=$(leftovers)
	[[ $left ]] || break
	sleep 0.5
done
if [[ $left ]]; then
	printf 'The tests left behind:\n%s\n' "$left" >&2
	status=1
fi

echo
[[ ! -e $CSI_SANITY_REPORT ]] || cat "$CSI_SANITY_REPORT"
grep -aE '^(ok|FAIL|---|panic:)' "$tmp.log"
hack/failures.awk "$tmp.log"
exit "$status"
