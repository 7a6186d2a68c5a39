#!/usr/bin/env bash
# One node: own network, mount, PID, UTS and IPC namespaces, in them containerd and kubelet.
# Usage: node.sh up|crash NAME [TAINT]
#
# A node with a taint takes only pods that tolerate it.
#
# crash is a power cut: every process of the node ends at once, and its mounts and network go. The file system of the
# volumes loses what it was not told to sync; `up` boots the node again, with what is left.
set -euo pipefail
. "$(dirname "$0")/env.sh"
node=$2 taint=${3-}
netns=q2e-$node
dir=$STATE/$node

# The hierarchies: those of v1, that of v2, or both.
cgroups() { awk '$3 ~ /^cgroup2?$/ { print $2 }' /proc/mounts; }

make_cgroups() {
	local root file
	for root in $(cgroups); do
		mkdir -p "$root/$netns"
		for file in cpuset.cpus cpuset.mems; do # in v1 a new cpuset is empty
			[[ ! -e $root/$file ]] || cat "$root/$file" >"$root/$netns/$file"
		done
	done
}

# A kubelet that finds the old ones waits for ever.
remove_cgroups() {
	local root
	for root in $(cgroups); do
		[[ ! -d $root/$netns ]] || find "$root/$netns" -depth -type d -exec rmdir {} +
	done
}

make_network() {
	ip netns add "$netns"
	ip link add "$netns" netns "$CONTROL" type veth peer name eth0 netns "$netns"
	in_netns "$CONTROL" bash -e <<-S
		ip link set $netns master nodes up
		ip route replace $(pod_net "$node") via $(node_ip "$node")
	S
	in_netns "$netns" bash -e <<-S
		ip link set lo up
		ip addr add $(node_ip "$node")/24 dev eth0
		ip link set eth0 up
		ip route add default via $control_ip
		sysctl -qw net.ipv4.ip_forward=1
	S
}

write_configuration() {
	mkdir -p "$dir"/{cni,log}
	cat >"$dir/cni/10-pods.conflist" <<-S
		{"cniVersion": "0.4.0", "name": "pods", "plugins": [{
		  "type": "bridge", "bridge": "pods", "isGateway": true,
		  "ipam": {"type": "host-local", "ranges": [[{"subnet": "$(pod_net "$node")"}]], "routes": [{"dst": "0.0.0.0/0"}]}
		}]}
	S
	cat >"$dir/containerd.toml" <<-S
		version = 2
		[plugins."io.containerd.grpc.v1.cri"]
		  sandbox_image = "localhost/pause:e2e"
		  disable_apparmor = true
		  restrict_oom_score_adj = true # where root may not lower it
		  [plugins."io.containerd.grpc.v1.cri".cni]
		    bin_dir = "/usr/lib/cni"
		    conf_dir = "$dir/cni"
		  [plugins."io.containerd.grpc.v1.cri".containerd]
		    default_runtime_name = "runc"
		    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
		      runtime_type = "io.containerd.runc.v2"
	S
	: >"$dir/resolv.conf"
	cat >"$dir/kubelet.yaml" <<-S
		apiVersion: kubelet.config.k8s.io/v1beta1
		kind: KubeletConfiguration
		failCgroupV1: false
		cgroupDriver: cgroupfs
		cgroupRoot: /$netns
		containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
		authentication: {x509: {clientCAFile: $PKI/ca.crt}}
		tlsCertFile: $PKI/$node.crt
		tlsPrivateKeyFile: $PKI/$node.key
		address: $(node_ip "$node")
		resolvConf: $dir/resolv.conf
		failSwapOn: false
		oomScoreAdj: 0
		makeIPTablesUtilChains: false # there are no Services to forward
		maxPods: 200
		imageGCHighThresholdPercent: 100
		evictionHard: {memory.available: 50Mi, nodefs.available: 1%, imagefs.available: 1%}
		nodeStatusUpdateFrequency: 2s
		# The tests watch what kubelet reacts to. A volume grows when the pod that uses it is synced.
		volumeStatsAggPeriod: 10s
		syncFrequency: 5s
	S
	[[ ! $taint ]] || echo "registerWithTaints: [{key: $taint, effect: NoSchedule}]" >>"$dir/kubelet.yaml"
}

# A file system of its own for the volumes: tests can fill it, and clones share their source's blocks.
mount_pool() {
	if [[ ! -e $dir/disk ]]; then
		truncate -s 24G "$dir/disk"
		mkfs.xfs -q "$dir/disk"
	fi
	mkdir -p "$dir/var/csi-qcow2"
	mount -o loop "$dir/disk" "$dir/var/csi-qcow2"
}

umount_pool() { ! pool_is_mounted || umount "$dir/var/csi-qcow2"; }

# After the power cut nothing else tells it.
pool_is_mounted() { grep -qF " $dir/var/csi-qcow2 " /proc/self/mountinfo; }

# What its file system was told to sync is left, nothing else: neither its journal nor what is cached. It may have been cut
# already, by an earlier try.
cut_pool() {
	! pool_is_mounted || xfs_io -x -c shutdown "$dir/var/csi-qcow2" 2>/dev/null || ! ls "$dir/var/csi-qcow2" >/dev/null 2>&1
}

up() {
	[[ -e $PKI/$node.conf ]] || "$E2E/cluster/pki.sh" "$node"
	make_cgroups
	make_network
	write_configuration
	mount_pool
	setsid nsenter --net="/run/netns/$netns" \
		unshare --mount --uts --ipc --pid --fork --kill-child --mount-proc --propagation slave \
		"$E2E/cluster/node-init.sh" "$node" >"$dir/log/init.log" 2>&1 </dev/null &
	echo "$!" >"$dir/pid"
}

# The node's first process takes everything in its PID namespace along.
crash() {
	local pid
	remember_pool
	cut_pool
	if pid=$(cat "$dir/pid" 2>/dev/null) && [[ -d /proc/$pid ]] && grep -qz "$E2E/cluster/node-init.sh" "/proc/$pid/cmdline"; then
		kill -9 "$pid"
		wait_for 30 test ! -d "/proc/$pid"
	fi
	rm -f "$dir/pid"
	wait_for 30 no_processes
	ip netns del "$netns" 2>/dev/null || true
	wait_for 10 remove_cgroups
	remove_loops
	wait_for 30 umount_pool
}

# A process that is being killed stays in its cgroup until it has ended.
no_processes() {
	local root
	for root in $(cgroups); do
		[[ -d $root/$netns ]] || continue
		[[ -z $(find "$root/$netns" -name cgroup.procs -exec cat {} +) ]] || return 1
	done
}

# A volume's ID has the first half of its pool's UUID in it. After the power cut the pool cannot be read.
remember_pool() {
	local pool
	pool=$(sed -nE 's/.*"uuid": *"([0-9a-f]{8}).*/\1/p' "$dir/var/csi-qcow2/pool/pool.json" 2>/dev/null) || true
	[[ ! $pool ]] || echo "$pool" >"$dir/pool"
}

# The devices that the node's engine served, and kubelet's on top of them, which keep them busy.
remove_loops() {
	local pool device file inode
	pool=$(cat "$dir/pool" 2>/dev/null) || true
	[[ $pool ]] || return 0
	losetup --noheadings --raw --output NAME,BACK-FILE | while read -r device file; do
		[[ $file == *-"$pool"-????????* ]] || continue
		inode=$(stat --format %i "$device")
		losetup --noheadings --raw --output NAME,BACK-INO,BACK-MAJ:MIN |
			awk -v inode="$inode" -v dev="$(mountpoint --fs-devno /dev)" '$2 == inode && $3 == dev { print $1 }' |
			xargs --no-run-if-empty losetup --detach
		losetup --detach "$device"
	done
}

"$1"
