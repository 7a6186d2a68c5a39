#!/usr/bin/env bash
# Types what the README says under "On a cluster", line by line, on the running cluster, whose nodes have no driver yet.
set -euo pipefail
. "$(dirname "$0")/env.sh"
cd "$E2E/../.."

# kubectl is the cluster's. What it would fetch from elsewhere is in the module of that version.
kubectl() {
	local args=("$@") crds
	if [[ $* == *external-snapshotter/client/config/crd?ref=* ]]; then
		crds=$(cd "$E2E/sidecars" && go list -m -f '{{.Dir}} {{.Version}}' github.com/kubernetes-csi/external-snapshotter/client/v8)
		[[ $* == *"ref=${crds##* }" ]] || die "the README names other snapshot CRDs than ${crds##* }"
		args[-1]=${crds% *}/config/crd
	fi
	in_netns "$CONTROL" "$KUBERNETES" kubectl --kubeconfig "$KUBECONFIG_ADMIN" "${args[@]}"
}

# ctr is what one types on each node.
ctr() {
	local dir pid
	for dir in "$STATE"/n[0-9]*; do
		pid=$(<"$dir/pid")
		pid=$(cut -d' ' -f1 "/proc/$pid/task/$pid/children") # the first process of its namespaces
		# shellcheck disable=SC2016 # they are the inner shell's
		nsenter --target "$pid" --mount sh -ec 'cd "$0"; exec ctr "$@"' "$PWD" "$@"
	done
}

readme=$(awk '/^## / { on = $0 == "## On a cluster" } on && /^```/ { if (code) exit; code = 1; next } code' README.md)
[[ $readme == *'kubectl apply'* ]] || die "the README has no quick start"
while read -r line <&3; do
	echo "\$ $line"
	eval "$line"
done 3<<<"$readme"
