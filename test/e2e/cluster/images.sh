#!/usr/bin/env bash
# Makes the archives that the nodes load: the driver under two tags, the sidecars, and what the tests' pods run.
set -euo pipefail
. "$(dirname "$0")/env.sh"
top=$(cd "$E2E/../.." && pwd)
mkdir -p "$IMAGES"
root=$(mktemp -d "$STATE/root.XXXX")
trap 'rm -rf "$root"' EXIT

# archive NAME DIR [ENTRYPOINT]: localhost/NAME:e2e.
archive() { "$top/hack/image-archive.sh" "$IMAGES/${1//:/-}.tar" "localhost/$1" "${@:2}"; }

# What the driver is upgraded to. The driver itself is loaded by whoever installs it.
make --no-print-directory -C "$top" image VERSION=e2e-next >/dev/null
mv "$top/dist/csi-qcow2.tar" "$IMAGES/csi-qcow2-e2e-next.tar"

# The sidecars, under the names that the manifests have. Each is as its original: one static binary, which is the entry point.
"$KUBERNETES" kubectl kustomize "$top/deploy/kubernetes/overlays/snapshot-controller" |
	sed -n 's|^ *\(- \)\?image: \(.*/.*\)|\2|p' | sort -u | while read -r image; do
	name=${image##*/} name=${name%:*}
	mkdir -p "$root/$name"
	ln "$CACHE/bin/$name" "$root/$name/$name" 2>/dev/null || cp "$CACHE/bin/$name" "$root/$name/$name"
	"$top/hack/image-archive.sh" "$IMAGES/$name.tar" "$image" "$root/$name" "/$name"
done

# system DIR: busybox, and a command that does nothing.
system() {
	mkdir -p "$1/bin"
	cp /bin/busybox "$1/bin/"
	chroot "$1" /bin/busybox --install -s /bin
	cat >"$1/bin/pause" <<-'S'
		#!/bin/sh
		trap 'exit 0' TERM
		while :; do sleep 3600 & wait $!; done
	S
	chmod +x "$1/bin/pause"
}
system "$root/pause"
archive pause:e2e "$root/pause" /bin/pause # holds a pod's namespaces
"$top/hack/image-root.sh" "$root/busybox" /usr/bin/fio
system "$root/busybox"
archive busybox:e2e "$root/busybox" # what the tests' pods run
"$top/hack/image-archive.sh" "$IMAGES/busybox.tar" busybox:1.37 "$root/busybox" # and those of the examples

ln -s "$CACHE/vm.tar" "$IMAGES/"
