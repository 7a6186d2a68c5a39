package host

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/internal/testfs"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"golang.org/x/sys/unix"
)

func newOSFile(t *testing.T) File {
	t.Helper()
	f, err := CreateFile(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() }) // most tests close it themselves
	return f
}

// blocks returns how many bytes of its file system a file occupies.
func blocks(t *testing.T, path string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

func TestOSFileReadsWhatWasWritten(t *testing.T) {
	f := newOSFile(t)
	data := bytes.Repeat([]byte{0xa5}, 5000)
	if n, err := f.WriteAt(data, 1000); n != len(data) || err != nil {
		t.Fatalf("WriteAt = %d, %v", n, err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	if size, err := f.Size(); size != 6000 || err != nil {
		t.Fatalf("Size = %d, %v", size, err)
	}
	got := make([]byte, 7000)
	if n, err := f.ReadAt(got, 0); n != 6000 || err != io.EOF { //nolint:errorlint // io.ReaderAt demands io.EOF itself
		t.Fatalf("ReadAt over the end = %d, %v; want 6000, io.EOF", n, err)
	}
	want := append(make([]byte, 1000), data...)
	if !bytes.Equal(got[:6000], want) {
		t.Fatal("read something else than was written")
	}
	if err := f.Truncate(9000); err != nil {
		t.Fatal(err)
	}
	if n, err := f.ReadAt(got, 6000); n != 3000 || err != io.EOF || bytes.ContainsFunc(got[:n], func(r rune) bool { return r != 0 }) { //nolint:errorlint // as above
		t.Fatalf("a longer file does not read as zeros: %d, %v", n, err)
	}
}

func TestOSFilePunchHole(t *testing.T) {
	for name, punch := range map[string]func(f *osFile, off, n int64) error{
		"punched": (*osFile).PunchHole,
		"written": (*osFile).writeZeros, // the way of file systems without holes
	} {
		t.Run(name, func(t *testing.T) {
			f, ok := newOSFile(t).(*osFile)
			if !ok {
				t.Fatal("not an osFile")
			}
			const size = 3 << 20
			if _, err := f.WriteAt(bytes.Repeat([]byte{1}, size), 0); err != nil {
				t.Fatal(err)
			}
			before := blocks(t, f.Name())
			for _, r := range [][2]int64{
				{4096, 2 << 20},    // inside
				{size - 100, 1000}, // over the end
				{size + 100, 1000}, // behind it
				{1 << 62, 1 << 62}, // farther than any offset
				{10, 0},            // nothing
			} {
				if err := punch(f, r[0], r[1]); err != nil && r[0] < 1<<62 {
					t.Fatalf("punch %v: %v", r, err)
				}
			}
			if got, err := f.Size(); got != size || err != nil {
				t.Fatalf("the length is %d, %v; want %d", got, err, size)
			}
			got := make([]byte, size)
			if _, err := f.ReadAt(got, 0); err != nil {
				t.Fatal(err)
			}
			for i, b := range got {
				zero := i >= 4096 && i < 4096+2<<20 || i >= size-100
				if (b == 0) != zero {
					t.Fatalf("byte %d is %d", i, b)
				}
			}
			if after := blocks(t, f.Name()); name == "punched" && after > before-2<<20 {
				t.Fatalf("no blocks came back: %d before, %d after", before, after)
			}
		})
	}
}

func TestOSFileAllocate(t *testing.T) {
	f := newOSFile(t)
	defer f.Close()
	if err := f.Truncate(4096); err != nil {
		t.Fatal(err)
	}
	before := blocks(t, f.Name())
	if err := f.(Allocator).Allocate(8192, 1<<20); err != nil { //nolint:forcetypeassert // it is one
		t.Fatal(err)
	}
	if got := blocks(t, f.Name()) - before; got < 1<<20 {
		t.Errorf("%d bytes of blocks were allocated", got)
	}
	if size, err := f.Size(); size != 4096 || err != nil {
		t.Errorf("the file has %d bytes now, %v", size, err)
	}
	if err := f.Truncate(4096); err != nil {
		t.Fatal(err)
	}
	if got := blocks(t, f.Name()); got != before {
		t.Errorf("%d bytes of blocks stay beyond the end", got-before)
	}
}

func TestOSFileReadOnly(t *testing.T) {
	w := newOSFile(t)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	r, err := OpenFile(w.Name(), true)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for op, err := range map[string]error{
		"write":    errOf(r.WriteAt([]byte{1}, 0)),
		"truncate": r.Truncate(1),
		"punch":    r.PunchHole(0, 1),
		"allocate": r.(Allocator).Allocate(0, 1),           //nolint:forcetypeassert // it is one
		"clone":    r.(RangeCloner).CloneRange(r, 0, 0, 1), //nolint:forcetypeassert // it is one
	} {
		if !errors.Is(err, ErrReadOnly) {
			t.Errorf("%s: %v, want ErrReadOnly", op, err)
		}
	}
	if err := r.Sync(); err != nil {
		t.Errorf("sync: %v", err)
	}
}

func TestOpenFileRefusesWhatIsNoRegularFile(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, fifo, "/dev/null"} {
		f, err := OpenFile(path, true)
		if err == nil {
			t.Errorf("%s was opened", path)
			_ = f.Close()
		} else if !errors.Is(err, format.ErrUnsupported) {
			t.Errorf("%s: %v, want ErrUnsupported", path, err)
		}
	}
	if _, err := OpenFile(filepath.Join(dir, "none"), true); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no file: %v, want fs.ErrNotExist", err)
	}
}

func TestCreateFileNeverTouchesWhatExists(t *testing.T) {
	dir := t.TempDir()
	file, link := filepath.Join(dir, "file"), filepath.Join(dir, "link")
	if err := os.WriteFile(file, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(dir, "nowhere"), link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{file, link} {
		if _, err := CreateFile(path); !errors.Is(err, ErrExists) {
			t.Errorf("%s: %v, want ErrExists", path, err)
		}
	}
	if got, err := os.ReadFile(file); string(got) != "content" || err != nil {
		t.Errorf("content is now %q, %v", got, err)
	}
	if _, err := os.Lstat(filepath.Join(dir, "nowhere")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the link was followed: %v", err)
	}
}

func TestOSFileClosed(t *testing.T) {
	f := newOSFile(t)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for op, err := range map[string]error{
		"read":  errOf(f.ReadAt([]byte{1}, 0)),
		"write": errOf(f.WriteAt([]byte{1}, 0)),
		"sync":  f.Sync(),
		"punch": f.PunchHole(0, 1),
		"close": f.Close(),
		"size":  errOf(f.Size()),
	} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%s: %v, want ErrClosed", op, err)
		}
	}
}

// A full file system is told apart from other failures, with the file and the offset.
func TestOSFileNoSpace(t *testing.T) {
	dir := testfs.Tmpfs(t, "1m")
	f, err := CreateFile(filepath.Join(dir, "file"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, err := f.WriteAt(make([]byte, 2<<20), 0)
	if !errors.Is(err, ErrNoSpace) || !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("wrote %d bytes: %v, want ErrNoSpace and ENOSPC", n, err)
	}
	if !bytes.Contains([]byte(err.Error()), []byte(f.Name())) {
		t.Errorf("the error does not name the file: %v", err)
	}
}

// On a file system with shared blocks a clone takes none of its own; elsewhere the caller is told to copy.
func TestOSFileCloneRange(t *testing.T) {
	const n = 8 << 20
	clone := func(t *testing.T, dir string) (dst File, err error) {
		t.Helper()
		src, err := CreateFile(filepath.Join(dir, "src"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = src.Close() })
		if _, err := src.WriteAt(bytes.Repeat([]byte{7}, n), 0); err != nil {
			t.Fatal(err)
		}
		if err := src.Sync(); err != nil {
			t.Fatal(err)
		}
		dst, err = CreateFile(filepath.Join(dir, "dst"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = dst.Close() })
		c, ok := dst.(RangeCloner)
		if !ok {
			t.Fatal("an osFile is no RangeCloner")
		}
		if err := c.CloneRange(src, 0, 0, 0); err != nil {
			t.Errorf("cloning nothing: %v", err)
		}
		if err := c.CloneRange(src, 0, 100, 4096); !errors.Is(err, errors.ErrUnsupported) {
			t.Errorf("unaligned: %v, want errors.ErrUnsupported", err)
		}
		return dst, c.CloneRange(src, 4096, 1<<20, n-4096)
	}
	t.Run("xfs", func(t *testing.T) {
		dst, err := clone(t, testfs.Image(t, "xfs", 320<<20, "mkfs.xfs", "-q", "-m", "reflink=1"))
		if err != nil {
			t.Fatal(err)
		}
		if size, err := dst.Size(); size != 1<<20+n-4096 || err != nil {
			t.Fatalf("size %d, %v", size, err)
		}
		got := make([]byte, n-4096)
		if _, err := dst.ReadAt(got, 1<<20); err != nil || !bytes.Equal(got, bytes.Repeat([]byte{7}, n-4096)) {
			t.Fatalf("the clone reads something else: %v", err)
		}
	})
	t.Run("tmpfs", func(t *testing.T) {
		if _, err := clone(t, testfs.Tmpfs(t, "32m")); !errors.Is(err, errors.ErrUnsupported) {
			t.Fatalf("%v, want errors.ErrUnsupported", err)
		}
	})
}
