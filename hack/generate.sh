#!/usr/bin/env bash
# Generates Go code from the .proto files.
# Usage: hack/generate.sh DIR      into DIR, which mirrors the repository
#        hack/generate.sh --check  fails when the code in the repository is not what the sources give
set -euo pipefail
cd "$(dirname "$0")/.."

tools=$(mktemp -d)
trap 'rm -rf "$tools"' EXIT

generate() {
	local out=$1
	for plugin in google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc; do
		go build -modfile=tools/go.mod -o "$tools/" "$plugin"
	done
	PATH=$tools:$PATH protoc --proto_path=. \
		--go_out="$out" --go_opt=paths=source_relative \
		--go-grpc_out="$out" --go-grpc_opt=paths=source_relative \
		pkg/engine/api/*.proto
}

if [[ ${1-} != --check ]]; then
	generate "${1:?usage: $0 DIR | --check}"
	exit
fi
mkdir "$tools/out"
generate "$tools/out"
for file in pkg/engine/api/*.pb.go; do
	diff -u "$file" "$tools/out/$file" || {
		echo "$file is not what its .proto gives: run make generate" >&2
		exit 1
	}
done
