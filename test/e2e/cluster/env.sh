# shellcheck shell=bash disable=SC2034 # sourced by the scripts beside it, which use the variables
# Where everything of the test cluster is. One cluster at a time: its names are fixed, so that whatever an earlier run
# left, killed or not, is found and removed.

E2E=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/csi-qcow2-e2e # what is built once: Kubernetes, the sidecars
STATE=/var/tmp/csi-qcow2-e2e                         # of the running cluster
KUBERNETES=$CACHE/bin/kubernetes
IMAGES=$STATE/images
PKI=$STATE/pki
KUBECONFIG_ADMIN=$PKI/admin.conf

CONTROL=q2e-control # network namespace of the control plane; q2e-n1 and so on are the nodes'
control_ip=10.10.0.1
service_ip=10.96.0.1 # of the Service "kubernetes"
node_ip() { echo "10.10.0.$((10 + ${1#n}))"; }
pod_net() { echo "10.244.${1#n}.0/24"; }

die() {
	echo "$*" >&2
	exit 1
}

# wait_for SECONDS COMMAND...: until the command succeeds.
wait_for() {
	local deadline=$((SECONDS + $1))
	shift
	until "$@" >/dev/null 2>&1; do
		((SECONDS < deadline)) || die "timed out: $*"
		sleep 0.2
	done
}

# Not `ip netns exec`, which mounts /sys anew and so hides the cgroups.
in_netns() { nsenter --net="/run/netns/$1" "${@:2}"; }
k() { in_netns "$CONTROL" "$KUBERNETES" kubectl --kubeconfig "$KUBECONFIG_ADMIN" "$@"; }
