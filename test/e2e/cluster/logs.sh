#!/usr/bin/env bash
# Copies the cluster's logs to where they outlive it, and says where.
set -euo pipefail
. "$(dirname "$0")/env.sh"
to=$CACHE/logs
rm -rf "$to"
mkdir -p "$to"
cp "$STATE"/log/*.log "$to"
for dir in "$STATE"/n[0-9]*; do
	for file in "$dir"/log/*.log; do cp "$file" "$to/${dir##*/}-${file##*/}"; done
done
{
	k get nodes,pods,pvc,pv,volumesnapshots,volumesnapshotcontents,csistoragecapacities -A -o wide
	k get events -A --sort-by=.lastTimestamp
} >"$to/objects.txt" 2>&1 || true
for pod in $(k -n csi-qcow2 get pods -o name); do
	k -n csi-qcow2 logs --all-containers --prefix --tail=2000 "$pod" >"$to/${pod#pod/}.log" 2>&1 || true
done
echo "The cluster's logs are in $to"
