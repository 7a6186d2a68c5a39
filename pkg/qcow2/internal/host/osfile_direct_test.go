package host

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// A file past the page cache is like another, whatever is asked for, alone or beside others, and however large its blocks are.
func TestDirectFile(t *testing.T) {
	for _, others := range []int32{0, 1} {
		for _, block := range []int64{512, 4096} {
			t.Run(fmt.Sprintf("%d others, blocks of %d", others, block), func(t *testing.T) {
				f := openDirectFile(t, block)
				f.inHand.Add(others)
				if _, err := OpenFile(f.Name(), true); !errors.Is(err, ErrInUse) {
					t.Errorf("opened a second time: %v", err)
				}
				useDirectFile(t, f)
				if made := len(f.submitters.idle); made != int(others) {
					t.Errorf("%d submitters", made)
				}
				must(t, f.Close())
				if _, err := f.WriteAt(make([]byte, 512), 0); !errors.Is(err, ErrClosed) {
					t.Errorf("write to a closed file: %v", err)
				}
			})
		}
	}
}

// useDirectFile compares reads and writes with those of memory.
func useDirectFile(t *testing.T, f *DirectFile) {
	t.Helper()
	model := make([]byte, 2<<20)
	rng := rand.New(rand.NewPCG(1, 1))
	for range 400 {
		off, n := rng.Int64N(1<<20), 1+rng.Int64N(5000)
		switch rng.IntN(4) {
		case 0:
			off, n = off&^511, (n+511)&^511
		case 1:
			n = 300 << 10 // more than one buffer
		}
		p := make([]byte, n)
		_, _ = rand.NewChaCha8([32]byte{byte(off), byte(off >> 8)}).Read(p) // never fails
		if rng.IntN(2) == 0 {
			got, err := f.WriteAt(p, off)
			if int64(got) != n || err != nil {
				t.Fatalf("write %d at %d: %d, %v", n, off, got, err)
			}
			copy(model[off:], p)
			continue
		}
		got, err := f.ReadAt(p, off)
		size, sizeErr := f.Size()
		must(t, sizeErr)
		if want := max(0, min(n, size-off)); int64(got) != want || want < n != errors.Is(err, io.EOF) {
			t.Fatalf("read %d at %d of %d: %d, %v", n, off, size, got, err)
		}
		if !bytes.Equal(p[:got], model[off:off+int64(got)]) {
			t.Fatalf("read %d at %d: something else than was written", n, off)
		}
	}
}

// Writes at the same time end up where they belong. What the kernel does not take fails as any other write does, and where it
// takes none that way they go the usual way.
func TestSubmittedWrites(t *testing.T) {
	f := openDirectFile(t, 512)
	defer f.Close()
	const writers, each, block = 16, 64, 4096
	write := func(i int64) {
		for k := range int64(each) {
			off := (k*writers + i) * block
			if n, err := f.WriteAt(stamp(int(i), off, block), off); n != block || err != nil {
				t.Errorf("write at %d: %d, %v", off, n, err)
			}
		}
	}
	check := func() {
		t.Helper()
		p := make([]byte, block)
		for off := int64(0); off < writers*each*block; off += block {
			_, err := f.ReadAt(p, off)
			must(t, err)
			if !bytes.Equal(p, stamp(int(off/block%writers), off, block)) {
				t.Fatalf("block at %d: something else than was written", off)
			}
		}
	}
	var all sync.WaitGroup
	for i := range int64(writers) {
		all.Go(func() { write(i) })
	}
	all.Wait()
	check()
	if made := len(f.submitters.idle); made < 2 || made > writers {
		t.Errorf("%d submitters for %d writers", made, writers)
	}

	f.inHand.Add(1)
	reader, err := os.Open(f.Name())
	must(t, err)
	defer reader.Close()
	refused := &DirectFile{osFile: &osFile{f: reader}, Block: 512}
	refused.inHand.Add(1)
	if n, err := refused.WriteAt(AlignedBuffer(block), 0); n != 0 || !errors.Is(err, unix.EBADF) {
		t.Errorf("write to a file that is open for reading: %d, %v", n, err)
	}
	refused.submitters.close()

	f.submitters.close()
	must(t, f.Truncate(0))
	for i := range int64(writers) {
		write(i)
	}
	check()
	if made := len(f.submitters.idle); made != 0 {
		t.Errorf("%d submitters where there can be none", made)
	}
}
