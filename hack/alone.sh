#!/usr/bin/env bash
# Runs a test program in a mount namespace of its own and checks that it leaves no mount behind; for go test -exec. The tests of
# another package, beside it, start plugins and pods: these begin with copies of all mounts that they see, and as long as they
# have them the devices are in use.
# Usage: hack/alone.sh PROGRAM [ARGUMENT...]
set -euo pipefail
mounts() { cut -d' ' -f5 /proc/self/mountinfo | sort; }

if [[ ${1:-} != --inside ]]; then
	exec unshare --mount "$0" --inside "$@"
fi
shift
before=$(mounts)
status=0
"$@" || status=$?
left=$(comm -13 <(echo "$before") <(mounts))
if [[ $left ]]; then
	printf 'The tests left mounts behind:\n%s\n' "$left" >&2
	exit 1
fi
exit "$status"
