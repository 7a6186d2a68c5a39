#!/usr/bin/env bash
# The first process of a node's namespaces: when it ends, the node is off.
# Usage: node-init.sh NAME
set -euo pipefail
. "$(dirname "$0")/env.sh"
node=$1
dir=$STATE/$node

hostname "$node"
mount --make-rshared / # kubelet and the plugin pass mounts on to each other
mount -t tmpfs tmpfs /run
mkdir /run/udev
: >/run/udev/control # looks as if the node had a udev
# What a node keeps, in the place where it is looked for. The tmpfs spares the machine the empty directories.
mount -t tmpfs tmpfs /var/lib
mount -t tmpfs tmpfs /var/log
for keep in containerd kubelet cni csi-qcow2; do
	mkdir -p "$dir/var/$keep" "/var/lib/$keep"
	mount --bind "$dir/var/$keep" "/var/lib/$keep"
done
# kubelet sets these: give it files of its own instead of the machine's.
mkdir -p /run/sysctl
for name in vm/overcommit_memory vm/panic_on_oom kernel/panic kernel/panic_on_oops kernel/keys/root_maxkeys \
	kernel/keys/root_maxbytes; do
	cat "/proc/sys/$name" >"/run/sysctl/${name//\//.}"
	mount --bind "/run/sysctl/${name//\//.}" "/proc/sys/$name"
done

containerd --config "$dir/containerd.toml" >>"$dir/log/containerd.log" 2>&1 &
wait_for 30 ctr version
for image in "$STATE"/images/*.tar; do
	ctr --namespace k8s.io images import "$image" >/dev/null
done
"$KUBERNETES" kubelet --config "$dir/kubelet.yaml" --kubeconfig "$PKI/$node.conf" --hostname-override "$node" \
	--node-ip "$(node_ip "$node")" >>"$dir/log/kubelet.log" 2>&1 &
wait -n
die "containerd or kubelet has ended"
