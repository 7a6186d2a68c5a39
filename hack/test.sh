#!/usr/bin/env bash
# Runs every test and checks that none of them left a loop device, a mount or a process behind.
# Usage: hack/test.sh [PACKAGE...]
set -euo pipefail
cd "$(dirname "$0")/.."
packages=("${@:-./...}")

# The tests' temporary files: on a disk (/tmp may be memory), with a short name (the path of a socket ends
# at 107 bytes). The tests' processes inherit the variable, so they can be told from all others.
tmp=$(mktemp -d /var/tmp/q2.XXXX)
trap 'rm -rf "$tmp"' EXIT

loops() { losetup --noheadings --output NAME,BACK-FILE | sort; }
mounts() { cut -d' ' -f5 /proc/self/mountinfo | sort; }
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
	comm -13 <(echo "$mounts_before") <(mounts) | sed 's/^/mount /'
	processes | sed 's/^/process /'
}
loops_before=$(loops)
mounts_before=$(mounts)

go vet "${packages[@]}"
status=0
report=$tmp.sanity # csi-sanity's count, which go test hides when all is well
TMPDIR=$tmp CSI_SANITY_REPORT=$report go test -race -p 2 -timeout 15m "${packages[@]}" || status=$?

if [[ -e $report ]]; then
	cat "$report"
	rm "$report"
fi

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
exit "$status"
