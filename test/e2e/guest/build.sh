#!/usr/bin/env bash
# Makes an image of QEMU and the disk of a virtual machine, /guest.img: an ext4 file system that has a boot loader, Debian's
# kernel, which is unpacked and not installed, and a system of busybox and ./init.
# Usage: build.sh ARCHIVE NAME:TAG
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
hack=$here/../../../hack
archive=$1 name=$2
work=$(mktemp -d "$archive.XXXX")
cleanup() {
	! mountpoint --quiet "$work/disk" || umount "$work/disk"
	rm -rf --one-file-system "$work"
}
trap cleanup EXIT
cd "$work"

download_kernel() {
	local package
	package=$(apt-cache depends linux-image-cloud-amd64 | sed -n 's/ *Depends: \(linux-image-.*\)/\1/p')
	apt-get download -qq "$package"
}
download_kernel 2>/dev/null || { apt-get update -qq && download_kernel; }
dpkg-deb --extract ./*.deb kernel
version=$(basename kernel/boot/vmlinuz-*)
version=${version#vmlinuz-}

# system DIR: a root file system of busybox.
system() {
	mkdir -p "$1"/{bin,sbin,dev,proc,disk}
	cp /bin/busybox "$1/bin/"
	chroot "$1" /bin/busybox --install -s /bin
}

system initrd
cp "$here/initrd-init" initrd/init
modules=lib/modules/$version
busybox depmod -b kernel "$version"
for module in virtio_pci virtio_blk; do
	{ grep "/$module.ko:" "kernel/$modules/modules.dep" || true; } | tr -d : | tr ' ' '\n'
done | sort -u >needed
cpio=(busybox cpio -H newc)
mkdir -p "initrd/$modules"
(cd "kernel/$modules" && "${cpio[@]}" -o <"$work/needed") | (cd "initrd/$modules" && "${cpio[@]}" -id)
cp "kernel/$modules/modules.dep" "initrd/$modules/"

truncate -s 64M image
mkfs.ext4 -q -O ^64bit,^metadata_csum image # the boot loader knows no newer
mkdir disk
mount -o loop image disk
system disk
mkdir -p disk/boot disk/data
cp "$here/init" disk/init
cp "kernel/boot/vmlinuz-$version" disk/boot/vmlinuz
(cd initrd && find . | "${cpio[@]}" -o) >disk/boot/initrd
cat >disk/boot/extlinux.conf <<-S
	DEFAULT linux
	LABEL linux
	LINUX /boot/vmlinuz
	INITRD /boot/initrd
	APPEND root=/dev/vda console=ttyS0 quiet mitigations=off panic=-1
S
extlinux --install disk/boot >/dev/null 2>&1 # warns of a disk without geometry
umount disk

qemu=(/usr/bin/qemu-system-x86_64 /usr/lib/*/qemu/accel-tcg-x86_64.so /usr/share/seabios/bios-256k.bin /usr/share/qemu/kvmvapic.bin)
"$hack/image-root.sh" root "${qemu[@]}" /bin/sh /bin/dash /bin/dd
mv image root/guest.img
"$hack/image-archive.sh" "$archive" "$name" root
