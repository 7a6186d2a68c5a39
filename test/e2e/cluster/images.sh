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

# The driver, as `make image` makes it. The second is what it is upgraded to.
for tag in e2e e2e-next; do
	make --no-print-directory -C "$top" image VERSION="$tag" >/dev/null
	mv "$top/dist/csi-qcow2.tar" "$IMAGES/csi-qcow2-$tag.tar"
done

# Each as its original is: one static binary, which is the entry point.
for name in csi-provisioner csi-snapshotter csi-resizer snapshot-controller registrar livenessprobe; do
	mkdir -p "$root/$name"
	ln "$CACHE/bin/$name" "$root/$name/$name" 2>/dev/null || cp "$CACHE/bin/$name" "$root/$name/$name"
	archive "$name:e2e" "$root/$name" "/$name"
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

ln -s "$CACHE/vm.tar" "$IMAGES/"
