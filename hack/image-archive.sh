#!/usr/bin/env bash
# Writes an image of one layer as an archive that containerd (ctr -n k8s.io images import), docker and podman (load)
# take. The same directory gives the same image.
# Usage: hack/image-archive.sh ARCHIVE NAME:TAG ROOT-DIRECTORY [ENTRYPOINT]
set -euo pipefail
archive=$1 name=$2 root=$3 entrypoint=${4-}

work=$(mktemp -d "$archive.XXXX")
trap 'rm -rf "$work"' EXIT
reproducible=(--sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 --format=gnu)
tar "${reproducible[@]}" -cf "$work/layer.tar" -C "$root" .
layer=$(sha256sum "$work/layer.tar" | cut -d' ' -f1)
config='"Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]'
[[ -z $entrypoint ]] || config+=", \"Entrypoint\": [\"$entrypoint\"]"
cat >"$work/config.json" <<-S
	{"architecture": "$(dpkg --print-architecture)", "os": "linux",
	 "config": {$config},
	 "rootfs": {"type": "layers", "diff_ids": ["sha256:$layer"]}}
S
cat >"$work/manifest.json" <<-S
	[{"Config": "config.json", "RepoTags": ["$name"], "Layers": ["layer.tar"]}]
S
tar "${reproducible[@]}" -cf "$archive" -C "$work" manifest.json config.json layer.tar
