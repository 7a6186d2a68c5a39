#!/usr/bin/env bash
# Checks that the linter refuses imports that run the wrong way: it plants one of each kind in each room of a copy.
set -euo pipefail
cd "$(dirname "$0")/.."
module=github.com/csi-qcow2/csi-qcow2
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z -- '*.go' '*.mod' '*.sum' .golangci.yml | xargs -0 cp --parents -t "$copy"

# What is imported: a package of nothing in each of the project's rooms, for real ones would make circles.
rooms=(pkg/{human,qcow2,pool,blockdev,internal,engine,engine/{api,rpc,holder,helper,worker},driver} cmd/csi-qcow2)
for room in "${rooms[@]}" pkg/qcow2/internal{,/fsck}; do
	mkdir "$copy/$room/planted"
	echo 'package planted' >"$copy/$room/planted/planted.go"
done
plant() {
	local room=$1 import
	shift
	{
		echo "package ${room##*/}"
		for import; do echo "import _ \"$import\""; done
	} >"$copy/$room/planted.go"
	for import; do echo "$room/planted.go $import"; done
}
but() { # the project's rooms but those that match
	local pattern
	pattern=$(IFS='|' && echo "$*")
	printf '%s\n' "${rooms[@]}" | grep -vxE "pkg/($pattern)" | sed "s,.*,$module/&/planted,"
}
kubernetes=(k8s.io/client-go/rest github.com/container-storage-interface/spec/lib/go/csi)
{
	mapfile -t wrong < <(but qcow2) && plant pkg/qcow2 "${wrong[@]}" "${kubernetes[@]}" k8s.io/klog/v2
	mapfile -t wrong < <(but none)
	plant pkg/qcow2/internal/fsck "${wrong[@]}" "$module/pkg/qcow2/internal/planted" golang.org/x/sys/unix "${kubernetes[@]}"
	plant pkg/qcow2/internal/host "${wrong[@]}" "$module/pkg/qcow2/internal/"{planted,fsck/planted} "${kubernetes[@]}"
	plant pkg/qcow2/internal/lock "${wrong[@]}" "$module/pkg/qcow2/internal/"{planted,fsck/planted} golang.org/x/sys/unix "${kubernetes[@]}"
	plant pkg/qcow2/internal/format "${wrong[@]}" "$module/pkg/qcow2/internal/"{planted,fsck/planted} golang.org/x/sys/unix "${kubernetes[@]}"
	mapfile -t wrong < <(but human internal) && plant pkg/human "${wrong[@]}" "${kubernetes[@]}"
	mapfile -t wrong < <(but internal) && plant pkg/internal/unixsocket "${wrong[@]}" "${kubernetes[@]}"
	mapfile -t wrong < <(but blockdev internal) && plant pkg/blockdev "${wrong[@]}" "${kubernetes[@]}"
	mapfile -t wrong < <(but pool qcow2 internal) && plant pkg/pool "${wrong[@]}" "${kubernetes[@]}"
	mapfile -t wrong < <(but 'engine(/.*)?' pool blockdev qcow2 internal) && plant pkg/engine "${wrong[@]}" "${kubernetes[@]}"
	mapfile -t wrong < <(but engine/{worker,helper,holder,rpc,api} pool blockdev qcow2 internal) && plant pkg/engine/worker "${wrong[@]}" "${kubernetes[@]}"
	mapfile -t wrong < <(but engine/{helper,rpc} blockdev internal) && plant pkg/engine/helper "${wrong[@]}" "${kubernetes[@]}"
	mapfile -t wrong < <(but engine/holder internal) && plant pkg/engine/holder "${wrong[@]}" "${kubernetes[@]}"
	mapfile -t wrong < <(but engine/{rpc,api} pool qcow2 internal) && plant pkg/engine/rpc "${wrong[@]}" "${kubernetes[@]}"
	mapfile -t wrong < <(but driver engine pool qcow2 human internal) && plant pkg/driver "${wrong[@]}"
	plant pkg/driver/cluster "${wrong[@]}"
} | sort >"$copy/want"

cp -r tools "$copy" # the linter's own version
(
	cd "$copy"
	go tool -modfile=tools/go.mod golangci-lint run --enable-only depguard --max-issues-per-linter 0 --max-same-issues 0 \
		--output.text.path stdout --output.text.print-issued-lines=false --allow-parallel-runners ./pkg/... || true
) | tee "$copy/out" | sed -nE "s/^(pkg[^:]*planted\.go):.*import '([^']*)' is not allowed.*/\1 \2/p" | sort -u >"$copy/got"
diff "$copy/want" "$copy/got" || {
	grep -v planted.go "$copy/out" || true
	echo 'The linter does not refuse the imports that begin with <: .golangci.yml, depguard.'
	exit 1
} >&2
