#!/usr/bin/env bash
# Makes certificates, of a cluster that lives for a day, and a kubeconfig for each client, in $STATE/pki: without
# arguments those of the control plane, else those of a node.
# Usage: pki.sh [NODE]
set -Eeuo pipefail
. "$(dirname "$0")/env.sh"
mkdir -p "$PKI"
cd "$PKI"

key=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes)

# certificate NAME SUBJECT [SUBJECT-ALTERNATIVE-NAMES]
certificate() {
	openssl req "${key[@]}" -subj "$2" -keyout "$1.key" -out "$1.csr"
	openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -out "$1.crt" \
		-extfile <(printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth,clientAuth\n' "${3:-DNS:$1}")
}

# client NAME SUBJECT [SUBJECT-ALTERNATIVE-NAMES]: a certificate and the kubeconfig that uses it.
client() {
	certificate "$@"
	cat >"$1.conf" <<-S
		apiVersion: v1
		kind: Config
		clusters: [{name: e2e, cluster: {server: "https://$control_ip", certificate-authority: $PKI/ca.crt}}]
		users: [{name: $1, user: {client-certificate: $PKI/$1.crt, client-key: $PKI/$1.key}}]
		contexts: [{name: e2e, context: {cluster: e2e, user: $1}}]
		current-context: e2e
	S
}

control_plane() {
	openssl req -x509 "${key[@]}" -days 2 -subj /CN=csi-qcow2-e2e -keyout ca.key -out ca.crt
	openssl genrsa -out sa.key 2048 # signs the tokens of service accounts
	openssl rsa -in sa.key -pubout -out sa.pub
	certificate apiserver /CN=kube-apiserver "DNS:kubernetes.default.svc,IP:127.0.0.1,IP:$control_ip,IP:$service_ip"
	client admin /O=system:masters/CN=admin
	client controller-manager /CN=system:kube-controller-manager
	client scheduler /CN=system:kube-scheduler
}

node() { client "$1" "/O=system:nodes/CN=system:node:$1" "DNS:$1,IP:$(node_ip "$1")"; }

log=$PWD/${1-control}.log
exec 3>&2 >"$log" 2>&1
trap 'cat "$log" >&3' ERR
if (($#)); then node "$1"; else control_plane; fi
