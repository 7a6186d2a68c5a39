#!/usr/bin/env bash
# Starts a cluster. Usage: up.sh [NUMBER-OF-NODES]
set -euo pipefail
cd "$(dirname "$0")"
. ./env.sh
nodes=()
for i in $(seq "${1:-1}"); do nodes+=("n$i"); done

./down.sh
mkdir -p "$STATE"
./build.sh
./images.sh
./pki.sh
./control.sh
for node in "${nodes[@]}"; do ./node.sh up "$node"; done
for node in "${nodes[@]}"; do
	wait_for 120 k wait --for=condition=Ready "node/$node" --timeout=1s
done
wait_for 30 k get serviceaccount default

# What a cluster has to have before csi-qcow2 is installed: the snapshot CRDs. The group snapshots' too, without which
# the controller waits half a minute.
crds=$(cd "$E2E/sidecars" && go list -m -f '{{.Dir}}' github.com/kubernetes-csi/external-snapshotter/client/v8)/config/crd
k apply -k "$crds" >/dev/null
k wait --for=condition=Established crd --all --timeout=30s >/dev/null

k apply -k "$E2E/overlay" >/dev/null
for daemonset in csi-qcow2-holder csi-qcow2-engine csi-qcow2-node; do
	k -n csi-qcow2 wait "daemonset/$daemonset" --for="jsonpath={.status.numberReady}=${#nodes[@]}" --timeout=120s
done
k -n csi-qcow2 rollout status deployment/snapshot-controller --timeout=120s
