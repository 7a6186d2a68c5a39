#!/usr/bin/env bash
# Starts the control plane in a network namespace of its own: etcd, API server, controller manager, scheduler.
set -euo pipefail
. "$(dirname "$0")/env.sh"
mkdir -p "$STATE/log" "$STATE/etcd"

ip netns add "$CONTROL"
in_netns "$CONTROL" bash -e <<-S
	ip link set lo up
	ip link add nodes type bridge
	ip addr add $control_ip/24 dev nodes
	ip link set nodes up
	# The Service's address itself, so that no kube-proxy is needed.
	ip addr add $service_ip/32 dev lo
	sysctl -qw net.ipv4.ip_forward=1
S

start() { # COMPONENT FLAG...
	setsid nsenter --net="/run/netns/$CONTROL" "$KUBERNETES" "$@" >"$STATE/log/$1.log" 2>&1 </dev/null &
	echo "$!" >"$STATE/$1.pid"
}

start etcd --data-dir "$STATE/etcd"
start kube-apiserver --etcd-servers=http://127.0.0.1:2379 --secure-port=443 --advertise-address="$control_ip" \
	--service-cluster-ip-range=10.96.0.0/16 --allow-privileged --authorization-mode=Node,RBAC \
	--enable-admission-plugins=NodeRestriction --client-ca-file="$PKI/ca.crt" \
	--tls-cert-file="$PKI/apiserver.crt" --tls-private-key-file="$PKI/apiserver.key" \
	--service-account-issuer=https://kubernetes.default.svc --service-account-key-file="$PKI/sa.pub" \
	--service-account-signing-key-file="$PKI/sa.key" --kubelet-certificate-authority="$PKI/ca.crt" \
	--kubelet-client-certificate="$PKI/admin.crt" --kubelet-client-key="$PKI/admin.key" \
	--kubelet-preferred-address-types=InternalIP
wait_for 120 k get --raw /readyz
as() { echo "--kubeconfig=$PKI/$1.conf --authentication-kubeconfig=$PKI/$1.conf --authorization-kubeconfig=$PKI/$1.conf"; }
# shellcheck disable=SC2046 # three flags
start kube-controller-manager $(as controller-manager) --bind-address=127.0.0.1 --leader-elect=false \
	--root-ca-file="$PKI/ca.crt" --service-account-private-key-file="$PKI/sa.key" --use-service-account-credentials
# shellcheck disable=SC2046 # three flags
start kube-scheduler $(as scheduler) --bind-address=127.0.0.1 --leader-elect=false
