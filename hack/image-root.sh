#!/usr/bin/env bash
# Copies programs, with the libraries that they are linked with, out of this Debian system into a directory: the root file
# system of an image. Without any it is what a node needs, the driver's image but for csi-qcow2 itself.
# Usage: hack/image-root.sh DIR [FILE...]
set -euo pipefail
out=$1

tools=(
	# file systems: make, check, grow, find out which
	/sbin/mke2fs /sbin/mkfs.ext3 /sbin/mkfs.ext4 /sbin/e2fsck /sbin/fsck.ext3 /sbin/fsck.ext4 /sbin/resize2fs /etc/mke2fs.conf
	/sbin/mkfs.xfs /sbin/fsck.xfs /sbin/xfs_repair /usr/sbin/xfs_growfs
	/sbin/fsck /sbin/blkid /sbin/blockdev
	/bin/mount /bin/umount
	# for fsck.xfs, the init container, and people who look around
	/bin/sh /bin/dash /bin/ls /bin/cat /bin/mkdir
)
(($# == 1)) || tools=("${@:2}")

# add FILE: and, if it is a symbolic link, what that points at.
add() {
	local dir file target
	dir=$(realpath "$(dirname "$1")") # /bin is a link to /usr/bin
	file=$dir/${1##*/}
	[[ ! -e $out$file && ! -L $out$file ]] || return 0
	mkdir -p "$out$dir"
	cp -P "$file" "$out$file"
	if [[ -L $file ]]; then
		target=$(readlink "$file")
		[[ $target == /* ]] || target=$dir/$target
		add "$target"
	fi
}

mkdir -p "$out"/{etc,dev,proc,sys,run,tmp,var/lib,usr/bin,usr/sbin,usr/lib,usr/lib64}
for merged in bin sbin lib lib64; do ln -sfn "usr/$merged" "$out/$merged"; done
: >"$out/etc/fstab"
printf 'root:x:0:0:root:/:/bin/sh\n' >"$out/etc/passwd"
printf 'root:x:0:\n' >"$out/etc/group"

for tool in "${tools[@]}"; do
	add "$tool"
	# What is no dynamic executable has no libraries.
	{ ldd "$tool" 2>/dev/null || true; } | { grep -o '/[^ ]*' || true; } | while read -r library; do add "$library"; done
done

# What was copied, for those who look for vulnerable packages: the packages as dpkg has them, the release, and the licences.
# Debian knows files by the paths from before the merge of /bin and /usr/bin, or after.
packages=$({ find "$out" -type f -printf '/%P\n' | sed 'p; s|^/usr||' | xargs dpkg -S 2>/dev/null || true; } |
	grep -v '^diversion' | cut -d: -f1 | sort -u)
mkdir -p "$out/var/lib/dpkg"
# shellcheck disable=SC2086 # many words
[[ -z $packages ]] || dpkg-query --status $packages >"$out/var/lib/dpkg/status"
add /etc/os-release
for package in $packages; do add "/usr/share/doc/$package/copyright"; done
