package qcow2

import (
	"encoding/binary"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// bitmapImage is an image with a persistent dirty bitmap of QEMU's, which tracks a write.
func bitmapImage(t *testing.T) (path string, f *memFile, extension, directory int64) {
	t.Helper()
	path = tempImage(t)
	qemuImg(t, "create", "-q", "-f", "qcow2", "-o", "cluster_size=4K", path, "4M")
	qemuImg(t, "bitmap", "--add", "-g", "512", path, "tracked")
	qemuIO(t, path, "write -P 1 0 1M")
	f = loadMemFile(t, path)
	h, err := format.ReadHeader(f, format.DecodeHeader)
	must(t, err)
	// The extension follows the header: find it by its type (specification: "Header extensions").
	for at := h.Length; ; {
		kind, n := get64(f, at)>>32, int64(get64(f, at)&0xffffffff)
		if kind == 0x23852875 {
			return path, f, at + 8, int64(binary.BigEndian.Uint64(h.Bitmaps[16:]))
		}
		at += 8 + format.Align8(n)
	}
}

// TestDamagedBitmaps damages each field of the bitmaps: our verdict is QEMU's or stricter, and a repair gives up the
// bitmaps, but nothing of the disk.
func TestDamagedBitmaps(t *testing.T) {
	path, sound, extension, directory := bitmapImage(t)
	table := int64(get64(sound, directory))
	add := func(at int64, xor uint64) func(*memFile) { return func(f *memFile) { put64(f, at, get64(f, at)^xor) } }
	set := func(at int64, v uint64) func(*memFile) { return func(f *memFile) { put64(f, at, v) } }
	for name, damage := range map[string]func(*memFile){
		"no bitmaps":                      add(extension, 1<<32),
		"too many":                        add(extension, 0xffff0000<<32),
		"a short directory":               set(extension+8, 8),
		"a huge directory":                set(extension+8, 1<<40),
		"a directory that ends in a row":  set(extension+8, 24),
		"a directory that goes on":        set(extension+8, get64(sound, extension+8)+24),
		"no directory":                    set(extension+16, 0),
		"a directory off its cluster":     set(extension+16, uint64(directory)+8),
		"a directory behind the end":      set(extension+16, 1<<40),
		"two, of which one is there":      add(extension, 3<<32),
		"no table":                        set(directory, 0),
		"a table off its cluster":         set(directory, uint64(table)+8),
		"a table behind the end":          set(directory, 1<<40),
		"a table where the directory is":  set(directory, uint64(directory)),
		"a table without entries":         add(directory+8, get64(sound, directory+8)>>32<<32),
		"a huge table":                    add(directory+8, 0xff000000<<32),
		"reserved flags":                  add(directory+8, 1<<8),
		"another type":                    add(directory+16, 1<<56),
		"a granularity beyond all":        add(directory+16, 0x40<<48),
		"a table entry that is reserved":  add(table, 1<<60),
		"a table entry off its cluster":   add(table, 1<<9),
		"a table entry that is both":      add(table, 1),
		"data where the directory is":     set(table, uint64(directory)),
		"data behind the end of the file": set(table, 1<<40),
	} {
		t.Run(name, func(t *testing.T) {
			f := sound.clone()
			damage(f)
			f.save(t, path)
			ours, err := Check(t.Context(), f, nil)
			status := ours.ExitStatus()
			if err != nil {
				status = 1
			}
			if q := runQemuCheck(t, path); status != q.exit && (status == 0 || status == 3) {
				t.Errorf("we exit with %d, QEMU with %d: %+v, %v\n%s", status, q.exit, ours, err, q.output)
			}
			before := readable(t, sound)
			r := repairFile(t, f, RepairAll)
			f.save(t, path)
			if q := runQemuCheck(t, path); q.exit != 0 || r.Left.ExitStatus() != 0 {
				t.Errorf("repaired %+v, still\n%s", r, q.output)
			}
			if diff := before.changed(t, f); diff != "" {
				t.Error(diff)
			}
		})
	}
}
