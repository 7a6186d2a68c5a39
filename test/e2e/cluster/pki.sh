#!/usr/bin/env bash
# Makes the certificates of a cluster that lives for a day, and a kubeconfig for each of its clients, in $STATE/pki.
# Usage: pki.sh NODE...
set -euo pipefail
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
	local config=("$KUBERNETES" kubectl config --kubeconfig "$1.conf")
	"${config[@]}" set-cluster e2e --server "https://$control_ip" --certificate-authority ca.crt --embed-certs
	"${config[@]}" set-credentials "$1" --client-certificate "$1.crt" --client-key "$1.key" --embed-certs
	"${config[@]}" set-context e2e --cluster e2e --user "$1"
	"${config[@]}" use-context e2e
}

{
	openssl req -x509 "${key[@]}" -days 2 -subj /CN=csi-qcow2-e2e -keyout ca.key -out ca.crt
	openssl genrsa -out sa.key 2048 # signs the tokens of service accounts
	openssl rsa -in sa.key -pubout -out sa.pub
	certificate apiserver /CN=kube-apiserver "DNS:kubernetes.default.svc,IP:127.0.0.1,IP:$control_ip,IP:$service_ip"
	client admin /O=system:masters/CN=admin
	client controller-manager /CN=system:kube-controller-manager
	client scheduler /CN=system:kube-scheduler
	for node in "$@"; do
		client "$node" "/O=system:nodes/CN=system:node:$node" "DNS:$node,IP:$(node_ip "$node")"
	done
} >pki.log 2>&1 || { cat pki.log >&2; exit 1; }
