#!/usr/bin/env bash
# Starts a cluster with the driver, which is installed as the README says. Usage: up.sh [NUMBER-OF-NODES]
# With EMPTY=1 the driver is left to you.
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

[[ ! ${EMPTY-} ]] || exit 0

./quickstart.sh
cp ../../../dist/csi-qcow2.tar "$IMAGES" # for nodes that join later
for daemonset in csi-qcow2-holder csi-qcow2-engine csi-qcow2-node; do
	k -n csi-qcow2 wait "daemonset/$daemonset" --for="jsonpath={.status.numberReady}=${#nodes[@]}" --timeout=120s
done
k -n csi-qcow2 rollout status deployment/snapshot-controller --timeout=120s
# What the quick start made. The tests that follow want empty pools.
k delete --wait -f ../../../deploy/examples >/dev/null
