package blockdev

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

func TestWholeDevice(t *testing.T) {
	for _, blockSize := range []int{512, 4096} {
		t.Run(fmt.Sprint(blockSize), func(t *testing.T) {
			const size, granularity = 10<<20 + 4096, 1 << 16
			b := newBackend(t, size)
			o := Options{Name: deviceName(t.Name()), LogicalBlockSize: blockSize, DiscardGranularity: granularity}
			d := attach(t, b, o)

			for attribute, want := range map[string]string{
				"loop/dio":                  "1",
				"loop/autoclear":            "0",
				"loop/partscan":             "0",
				"ro":                        "0",
				"size":                      fmt.Sprint(size / 512),
				"queue/logical_block_size":  fmt.Sprint(blockSize),
				"queue/discard_granularity": fmt.Sprint(granularity),
				"queue/write_cache":         "write back",
			} {
				if got := sysfs(t, d.Path(), attribute); got != want {
					t.Errorf("%s is %q, want %q", attribute, got, want)
				}
			}
			found, err := Find(o.Name)
			must(t, err)
			if len(found) != 1 || found[0] != (Info{d.Path(), o.Name, size}) {
				t.Errorf("Find: %v", found)
			}

			writeInPieces(t, d.Path(), size, blockSize)
			got, err := os.ReadFile(b.file.Name())
			must(t, err)
			want := make([]byte, size)
			stamp(want, 0, 1)
			if !bytes.Equal(got, want) {
				t.Error("the backend does not hold what was written to the device")
			}
			// From the device too: in one piece larger than a request.
			buf := aligned(size)
			_, err = io.ReadFull(directIO(t, d.Path()), buf)
			must(t, err)
			if !bytes.Equal(buf, want) {
				t.Error("the device does not return what was written to it")
			}
		})
	}
}

// writeInPieces writes the pattern of seed 1 from several writers, in pieces of random size and order.
func writeInPieces(t *testing.T, path string, size int64, blockSize int) {
	t.Helper()
	rng := rand.New(rand.NewPCG(1, 2))
	var pieces []span
	for off := int64(0); off < size; {
		n := min(size-off, int64(blockSize)*(1+rng.Int64N(3<<20/int64(blockSize))))
		pieces = append(pieces, span{off, n})
		off += n
	}
	rng.Shuffle(len(pieces), func(i, j int) { pieces[i], pieces[j] = pieces[j], pieces[i] })

	var wg sync.WaitGroup
	work := make(chan span, len(pieces))
	for _, p := range pieces {
		work <- p
	}
	close(work)
	f := directIO(t, path)
	for range 4 {
		wg.Go(func() {
			for p := range work {
				buf := aligned(int(p.n))
				stamp(buf, p.off, 1)
				if _, err := f.WriteAt(buf, p.off); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	must(t, f.Close())
}

func TestReadOnly(t *testing.T) {
	b := newBackend(t, 1<<20)
	stamped := aligned(1 << 20)
	stamp(stamped, 0, 7)
	_, err := b.file.WriteAt(stamped, 0)
	must(t, err)
	d := attach(t, b, Options{ReadOnly: true})
	if got := sysfs(t, d.Path(), "ro"); got != "1" {
		t.Errorf("ro is %s", got)
	}
	if f, err := os.OpenFile(d.Path(), os.O_RDWR|unix.O_DIRECT, 0); err == nil { // kernels differ in where they refuse
		if _, err := f.WriteAt(aligned(4096), 0); err == nil {
			t.Error("a read-only device was written")
		}
		must(t, f.Close())
	}
	got := aligned(1 << 20)
	f := openDevice(t, d.Path(), os.O_RDONLY|unix.O_DIRECT)
	_, err = io.ReadFull(f, got)
	must(t, err)
	must(t, f.Close())
	if !bytes.Equal(got, stamped) {
		t.Error("wrong content")
	}
	b.grow(t, 2<<20)
	must(t, d.Resize())
}

func TestAttachRefuses(t *testing.T) {
	long := strings.Repeat("x", 64)
	for what, o := range map[string]Options{
		"no name":          {Name: ""},
		"a path":           {Name: "a/b"},
		"a folder":         {Name: ".."},
		"long name":        {Name: long},
		"zero in name":     {Name: "a\x00b"},
		"odd block":        {Name: "x", LogicalBlockSize: 513},
		"small block":      {Name: "x", LogicalBlockSize: 256},
		"large block":      {Name: "x", LogicalBlockSize: 2 * os.Getpagesize()},
		"odd granularity":  {Name: "x", DiscardGranularity: 3000},
		"unaligned volume": {Name: "x", LogicalBlockSize: 4096},
	} {
		t.Run(what, func(t *testing.T) {
			d, err := Attach(newBackend(t, 1<<20+512), o)
			if err == nil {
				t.Error("accepted")
				must(t, d.Detach())
			}
		})
	}
}

func TestResizeUnderLoad(t *testing.T) {
	const step = 8 << 20
	b := newBackend(t, step)
	d := attach(t, b, Options{})
	f := directIO(t, d.Path())
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			buf := aligned(4096)
			for n := int64(i); ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				if _, err := f.WriteAt(buf, n*4096%step); err != nil {
					t.Errorf("write during resize: %v", err)
					return
				}
			}
		})
	}
	buf := aligned(64 << 10)
	for i := int64(2); i <= 40; i++ {
		b.grow(t, i*step)
		must(t, d.Resize())
		// The last bytes are there at once, for reading first.
		_, err := f.ReadAt(buf, i*step-int64(len(buf)))
		must(t, err)
		_, err = f.WriteAt(buf, i*step-int64(len(buf)))
		must(t, err)
	}
	close(stop)
	wg.Wait()
	must(t, f.Close())
}

// TestManyAtOnce attaches, uses and detaches more devices than there are device nodes at boot, at once.
func TestManyAtOnce(t *testing.T) {
	const devices, rounds, size = 20, 2, 1 << 20
	backends := make([]*testBackend, devices)
	for i := range backends {
		backends[i] = newBackend(t, size)
	}
	before := takeInventory(t)
	var wg sync.WaitGroup
	for i, b := range backends {
		wg.Go(func() {
			for round := range rounds {
				name := fmt.Sprintf("%s%d:many-%d", testPrefix, os.Getpid(), i)
				if err := useOnce(b, name, byte(round)); err != nil {
					t.Errorf("device %d: %v", i, err)
				}
			}
		})
	}
	wg.Wait()
	before.compare(t)
	if out := run(t, "losetup", "-a"); strings.Contains(out, fmt.Sprintf("%s%d", testPrefix, os.Getpid())) {
		t.Errorf("devices left:\n%s", out)
	}
}

func useOnce(b *testBackend, name string, seed byte) error {
	d, err := Attach(b, Options{Name: name})
	if err != nil {
		return err
	}
	want, got := aligned(int(b.Size())), make([]byte, b.Size())
	stamp(want, 0, seed)
	f, err := os.OpenFile(d.Path(), os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	if _, err := f.WriteAt(want, 0); err != nil {
		return err
	}
	f.Close()
	if err := d.Detach(); err != nil {
		return err
	}
	if _, err := b.file.ReadAt(got, 0); err != nil {
		return err
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%s has lost a write", name)
	}
	return nil
}

// inventory counts what a device could leak.
type inventory struct{ fds, threads, goroutines, residentMiB int }

func takeInventory(t *testing.T) inventory {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	threads, err := os.ReadDir("/proc/self/task")
	must(t, err)
	statm, err := os.ReadFile("/proc/self/statm")
	must(t, err)
	var virtual, resident int
	_, err = fmt.Sscan(string(statm), &virtual, &resident)
	must(t, err)
	return inventory{len(fds), len(threads), runtime.NumGoroutine(), resident * os.Getpagesize() >> 20}
}

// compare fails if there is more than before. The Go runtime may keep a few threads more for itself, and the race
// detector its shadow memory; forty times a device have 640 threads and 640 MiB of buffers.
func (before inventory) compare(t *testing.T) {
	t.Helper()
	var now inventory
	defer func() { t.Logf("before %+v, after %+v", before, now) }()
	waitFor(t, "no descriptor, thread, goroutine or memory left", func() bool {
		debug.FreeOSMemory()
		now = takeInventory(t)
		return now.fds <= before.fds && now.goroutines <= before.goroutines &&
			now.threads < before.threads+serverThreads && now.residentMiB < before.residentMiB+400
	})
}

// TestStaticDev: where /dev is a copy, new device nodes are missing; what else bears the name is refused.
func TestStaticDev(t *testing.T) {
	ctl, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	must(t, err)
	t.Cleanup(func() { ctl.Close() })
	number := 1000 + os.Getpid()%1000 // nobody asks for so many
	must(t, unix.IoctlSetInt(int(ctl.Fd()), unix.LOOP_CTL_ADD, number))
	t.Cleanup(func() {
		_ = os.Remove(loopPath(number))
		must(t, unix.IoctlSetInt(int(ctl.Fd()), unix.LOOP_CTL_REMOVE, number))
	})
	must(t, os.Remove(loopPath(number)))
	fd, err := openLoop(number, os.O_RDONLY)
	must(t, err)
	must(t, unix.Close(fd))
	must(t, os.Remove(loopPath(number)))
	must(t, os.WriteFile(loopPath(number), nil, 0o600))
	if fd, err := openLoop(number, os.O_RDONLY); err == nil {
		unix.Close(fd)
		t.Error("a regular file was taken for a loop device")
	}
}

// TestInvisible: no process sees a FUSE mount, and our own mount namespace is what it was.
func TestInvisible(t *testing.T) {
	before, err := os.Readlink("/proc/self/ns/mnt")
	must(t, err)
	d := attach(t, newBackend(t, 1<<20), Options{})
	other := exec.Command("sleep", "infinity") // there may be none else
	must(t, other.Start())
	defer func() {
		_ = other.Process.Kill()
		_ = other.Wait()
	}()
	files, err := filepath.Glob("/proc/[0-9]*/mountinfo")
	must(t, err)
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil { // gone meanwhile
			continue
		}
		if bytes.Contains(b, []byte("- fuse csi-qcow2")) {
			t.Errorf("%s shows a FUSE mount:\n%s", f, b)
		}
	}
	threads, err := filepath.Glob("/proc/self/task/*/ns/mnt")
	must(t, err)
	for _, thread := range threads {
		if ns, err := os.Readlink(thread); err == nil && ns != before {
			t.Errorf("%s is in another mount namespace", thread)
		}
	}
	must(t, d.Detach())
}
