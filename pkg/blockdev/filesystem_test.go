package blockdev

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestFileSystems(t *testing.T) {
	for _, fsType := range []string{"ext4", "xfs"} {
		for _, blockSize := range []int{512, 4096} {
			t.Run(fmt.Sprintf("%s/%d", fsType, blockSize), func(t *testing.T) {
				b := newBackend(t, 512<<20)
				d := attach(t, b, Options{LogicalBlockSize: blockSize, DiscardGranularity: 1 << 16})
				run(t, "mkfs."+fsType, "-q", d.Path())
				dir := t.TempDir()
				mount(t, d.Path(), dir, fsType)
				want := writeTree(t, dir)

				b.spans()
				must(t, os.RemoveAll(filepath.Join(dir, "gone")))
				unix.Sync()
				run(t, "fstrim", dir)
				discarded, _ := b.spans()
				if total(discarded) < 64<<20 {
					t.Errorf("fstrim of a mostly empty file system discarded %d bytes", total(discarded))
				}

				b.grow(t, 768<<20)
				must(t, d.Resize())
				if fsType == "xfs" {
					run(t, "xfs_growfs", dir)
				}

				must(t, unix.Unmount(dir, 0))
				if fsType == "ext4" { // growing it mounted takes CAP_SYS_RESOURCE, which not every root has
					run(t, "e2fsck", "-fp", d.Path())
					run(t, "resize2fs", d.Path())
				}
				mount(t, d.Path(), dir, fsType)
				var st unix.Statfs_t
				must(t, unix.Statfs(dir, &st))
				if got := int64(st.Blocks) * st.Bsize; got < 640<<20 {
					t.Errorf("the file system has not grown: %d bytes", got)
				}
				if got := readTree(t, dir); got != want {
					t.Error("files differ after unmount and mount")
				}
				must(t, unix.Unmount(dir, 0))
				must(t, d.Detach())

				// Another device on the same backend: all of it had arrived there.
				d = attach(t, b, Options{LogicalBlockSize: blockSize})
				fsck := map[string][]string{"ext4": {"e2fsck", "-fn"}, "xfs": {"xfs_repair", "-n"}}[fsType]
				run(t, fsck[0], append(fsck[1:], d.Path())...)
				mount(t, d.Path(), dir, fsType)
				if got := readTree(t, dir); got != want {
					t.Error("files differ after detach and attach")
				}
				must(t, unix.Unmount(dir, 0))
			})
		}
	}
}

func mount(t *testing.T, device, dir, fsType string) {
	t.Helper()
	must(t, unix.Mount(device, dir, fsType, 0, ""))
	t.Cleanup(func() {
		if len(mountsOf(device)) != 0 {
			_ = unix.Unmount(dir, unix.MNT_DETACH)
		}
	})
}

// writeTree writes files, and a folder "gone" that is not in the digest.
func writeTree(t *testing.T, dir string) string {
	t.Helper()
	rng := rand.NewChaCha8([32]byte{1})
	for i := range 40 {
		for _, sub := range []string{"kept", "gone"} {
			must(t, os.MkdirAll(filepath.Join(dir, sub), 0o700))
			p := make([]byte, i*i*200)
			_, _ = rng.Read(p)
			must(t, os.WriteFile(filepath.Join(dir, sub, fmt.Sprint(i)), p, 0o600))
		}
	}
	return readTree(t, dir)
}

// readTree returns a digest of the files in "kept".
func readTree(t *testing.T, dir string) string {
	t.Helper()
	h := sha256.New()
	must(t, fs.WalkDir(os.DirFS(filepath.Join(dir, "kept")), ".", func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		b, err := os.ReadFile(filepath.Join(dir, "kept", path))
		fmt.Fprintln(h, path, len(b))
		h.Write(b)
		return err
	}))
	return fmt.Sprintf("%x", h.Sum(nil))
}

func total(spans []span) (n int64) {
	for _, s := range spans {
		n += s.n
	}
	return n
}

// TestFio lets fio write with checksums and read them back.
func TestFio(t *testing.T) {
	d := attach(t, newBackend(t, 64<<20), Options{})
	run(t, "fio", "--name=verify", "--verify_state_save=0", "--filename="+d.Path(), "--direct=1", "--ioengine=libaio", "--iodepth=32",
		"--rw=randwrite", "--bsrange=512-1m", "--bs_unaligned=0", "--blockalign=512", "--size=64m", "--verify=crc32c", "--verify_fatal=1",
		"--do_verify=1", "--serialize_overlap=1", "--fsync=64")
	run(t, "fio", "--name=mixed", "--verify_state_save=0", "--filename="+d.Path(), "--direct=1", "--ioengine=libaio", "--iodepth=16",
		"--rw=randrw", "--bs=4k", "--size=32m", "--verify=crc32c", "--verify_fatal=1", "--numjobs=2", "--offset_increment=32m")
}
