#!/usr/bin/env bash
# Ends the cluster, running or broken, and removes everything that it left.
set -euo pipefail
cd "$(dirname "$0")"
. ./env.sh

crashes=()
for dir in "$STATE"/n[0-9]*; do
	[[ -d $dir ]] || continue
	./node.sh crash "${dir##*/}" &
	crashes+=($!)
done
for pid in "${crashes[@]}"; do wait "$pid"; done
for file in "$STATE"/*.pid; do
	pid=$(cat "$file" 2>/dev/null) || continue
	# The number may be another's by now.
	[[ $(readlink "/proc/$pid/exe") == "$KUBERNETES"* ]] || continue
	kill -9 "$pid"
	wait_for 10 test ! -d "/proc/$pid"
done
ip netns del "$CONTROL" 2>/dev/null || true
rm -rf --one-file-system "$STATE"
