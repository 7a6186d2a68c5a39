#!/usr/bin/env bash
# Builds what the cluster consists of into the cache: Kubernetes in one binary, the sidecars, and the image of a virtual
# machine. This takes a quarter of an hour on two cores the first time; afterwards Go's build cache and ours make it seconds.
set -euo pipefail
. "$(dirname "$0")/env.sh"
export CGO_ENABLED=0 GOWORK=off

# built NAME DIR COMMAND...: runs the command in DIR unless it did already for the same files and toolchain.
built() {
	local stamp=$CACHE/$1.built key
	key=$(cd "$2" && { go version && find . ../go.* -type f | sort | xargs sha256sum; } | sha256sum)
	[[ -e $stamp && $(<"$stamp") == "$key" ]] && return
	echo "Building $1"
	mkdir -p "$CACHE/bin"
	(cd "$2" && "${@:3}")
	echo "$key" >"$stamp"
}

# Without its version Kubernetes calls itself v0.0.0, which sidecars and clients refuse.
version=$(cd "$E2E/kubernetes" && go list -m -f '{{.Version}}' k8s.io/kubernetes)
IFS=. read -r major minor _ <<<"${version#v}"
flags="-s -w"
for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
	flags+=" -X $package.gitVersion=$version -X $package.gitMajor=$major -X $package.gitMinor=$minor"
done
built kubernetes "$E2E/kubernetes" go build -trimpath -ldflags "$flags" -o "$KUBERNETES" .
built sidecars "$E2E/sidecars" go build -trimpath -ldflags '-s -w' -o "$CACHE/bin/" tool ./...
built guest "$E2E/guest" ./build.sh "$CACHE/vm.tar" localhost/vm:e2e
