#!/usr/bin/env bash
# Writes dist/csi-qcow2.tar, the image that the Dockerfile describes, without a container engine or a registry: its
# tools come from the machine's own Debian packages. Containerd loads it with: ctr -n k8s.io images import
set -euo pipefail
cd "$(dirname "$0")/.."
version=${VERSION:-unknown}

root=$(mktemp -d /var/tmp/csi-qcow2-image.XXXX)
trap 'rm -rf "$root"' EXIT
make build VERSION="$version"
hack/image-root.sh "$root"
install -D bin/csi-qcow2 "$root/usr/local/bin/csi-qcow2"
mkdir -p dist
hack/image-archive.sh dist/csi-qcow2.tar "csi-qcow2:${version//+/-}" "$root" /usr/local/bin/csi-qcow2
echo "dist/csi-qcow2.tar is csi-qcow2:${version//+/-}, $(du -h dist/csi-qcow2.tar | cut -f1)"
