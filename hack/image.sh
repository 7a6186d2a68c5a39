#!/usr/bin/env bash
# Writes dist/csi-qcow2.tar, an OCI archive of the image that the Dockerfile describes, without a registry: its
# root file system comes from Debian's packages. Containerd loads it with: ctr -n k8s.io images import
set -euo pipefail
cd "$(dirname "$0")/.."
version=${VERSION:-unknown}

work=$(mktemp -d /var/tmp/csi-qcow2-image.XXXX)
container=
cleanup() {
	[[ -z $container ]] || b rm "$container" >/dev/null
	rm -rf "$work"
}
trap cleanup EXIT
# Nothing is run in the container, so neither a runtime nor a storage driver beyond plain copies is needed.
b() { buildah --root "$work/storage" --runroot "$work/run" --storage-driver vfs "$@"; }

make build VERSION="$version"
packages=$(paste -sd, hack/node-packages)
echo "Making a root file system of $packages"
mmdebstrap --quiet --variant=apt --include="$packages" \
	--dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
	bookworm "$work/rootfs.tar"

container=$(b from scratch)
b add --quiet "$container" "$work/rootfs.tar" /
b copy --quiet "$container" bin/csi-qcow2 /usr/local/bin/csi-qcow2
b config --entrypoint '["/usr/local/bin/csi-qcow2"]' --label "version=$version" "$container"
mkdir -p dist
rm -f dist/csi-qcow2.tar
b commit --quiet "$container" "oci-archive:dist/csi-qcow2.tar:csi-qcow2:$version" >/dev/null
echo "dist/csi-qcow2.tar is csi-qcow2:$version, $(du -h dist/csi-qcow2.tar | cut -f1)"
