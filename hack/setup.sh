#!/usr/bin/env bash
# Installs what a make target needs and the machine lacks, from Debian's packages.
# Usage: hack/setup.sh demo|test|lint|generate|image|e2e|all
set -euo pipefail

# package=file: a package is missing when its file is.
demo=(
	qemu-utils=/usr/bin/qemu-img
	e2fsprogs=/sbin/mkfs.ext4
	xfsprogs=/sbin/mkfs.xfs
	mount=/bin/mount
	util-linux=/sbin/blkid
)
test=(
	"${demo[@]}"
	qemu-system-common=/usr/bin/qemu-storage-daemon
	fio=/usr/bin/fio
	sqlite3=/usr/bin/sqlite3
	strace=/usr/bin/strace
	btrfs-progs=/sbin/mkfs.btrfs
	gcc=/usr/bin/gcc # the race detector links with it
	libc6-dev=/usr/include/stdlib.h
)
generate=(
	protobuf-compiler=/usr/bin/protoc
	libprotobuf-dev=/usr/include/google/protobuf/timestamp.proto
)
lint=(
	shellcheck=/usr/bin/shellcheck
)
image=(
	e2fsprogs=/sbin/mkfs.ext4
	xfsprogs=/sbin/mkfs.xfs
	mount=/bin/mount
	util-linux=/sbin/blkid
)
e2e=(
	"${image[@]}"
	containerd=/usr/bin/containerd
	runc=/usr/sbin/runc
	containernetworking-plugins=/usr/lib/cni/bridge
	iproute2=/sbin/ip
	openssl=/usr/bin/openssl
	busybox-static=/bin/busybox # what the tests' pods run
	fio=/usr/bin/fio
	# a virtual machine in a pod
	qemu-system-x86=/usr/bin/qemu-system-x86_64
	extlinux=/usr/bin/extlinux
)

case "${1-}" in
demo) want=("${demo[@]}") ;;
test) want=("${test[@]}") ;;
generate) want=("${generate[@]}") ;;
lint) want=("${lint[@]}") ;;
image) want=("${image[@]}") ;;
e2e) want=("${e2e[@]}") ;;
all) want=("${test[@]}" "${e2e[@]}" "${generate[@]}" "${lint[@]}") ;;
*)
	echo "usage: $0 demo|test|lint|generate|image|e2e|all" >&2
	exit 1
	;;
esac

missing=()
for entry in "${want[@]}"; do
	[[ -e ${entry#*=} ]] || missing+=("${entry%%=*}")
done
((${#missing[@]})) || exit 0

if [[ $(id -u) != 0 ]]; then
	echo "$0: run this as root, or install: ${missing[*]}" >&2
	exit 1
fi
echo "Installing ${missing[*]}"
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -o DPkg::Lock::Timeout=300 -y -qq --no-install-recommends "${missing[@]}" >/dev/null; }
# The package lists of a fresh machine are empty or old: only then they are worth a download.
install 2>/dev/null || { apt-get update -qq && install; }
