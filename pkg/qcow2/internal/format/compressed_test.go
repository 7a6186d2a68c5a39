package format

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
)

func deflate(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w, err := flate.NewWriter(&out, flate.DefaultCompression)
	must(t, err)
	_, err = w.Write(b)
	must(t, err)
	must(t, w.Close())
	return out.Bytes()
}

func TestDecompressDeflate(t *testing.T) {
	const cluster = 4096
	content := bytes.Repeat([]byte("0123456789abcdef"), cluster/16)
	stream := deflate(t, content)
	stored := deflate(t, pattern(1, cluster)) // does not shrink
	for _, test := range []struct {
		name string
		src  []byte
		want []byte // nil: ErrCorrupt
	}{
		{"exact", stream, content},
		{"padded to sectors", append(bytes.Clone(stream), bytes.Repeat([]byte{0xff}, 512)...), content},
		{"incompressible", stored, pattern(1, cluster)},
		{"more than a cluster", deflate(t, append(bytes.Clone(content), 1, 2, 3)), content},
		{"a bomb", deflate(t, make([]byte, 4<<20)), make([]byte, cluster)},
		{"less than a cluster", deflate(t, content[:cluster-1]), nil},
		{"cut", stored[:len(stored)/2], nil},
		{"empty", nil, nil},
		{"garbage", bytes.Repeat([]byte{0xff}, 512), nil},
		{"zeros", make([]byte, 512), nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			var z Decompressor
			for range 2 { // the second with a used decompressor
				dst := make([]byte, cluster)
				err := z.Decompress(dst, test.src)
				switch {
				case test.want == nil && !errors.Is(err, ErrCorrupt):
					t.Fatalf("got %v, want ErrCorrupt", err)
				case test.want != nil && err != nil:
					t.Fatal(err)
				case test.want != nil && !bytes.Equal(dst, test.want):
					t.Fatal("wrong content")
				}
			}
		})
	}
}

func TestDecompressConcurrently(t *testing.T) {
	var z Decompressor
	var wg sync.WaitGroup
	for i := range 8 {
		want := pattern(byte(i), 4096)
		src := deflate(t, want)
		wg.Go(func() {
			dst := make([]byte, len(want))
			for range 50 {
				if err := z.Decompress(dst, src); err != nil || !bytes.Equal(dst, want) {
					t.Errorf("stream %d: %v", i, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestDecompressQEMU reads every compressed cluster of images that qemu-img compressed, by the entries alone.
func TestDecompressQEMU(t *testing.T) {
	for _, c := range []struct {
		clusterSize int
		kind        string
	}{{512, "zlib"}, {4096, "zlib"}, {65536, "zlib"}, {2 << 20, "zlib"}, {512, "zstd"}, {4096, "zstd"}, {65536, "zstd"}, {2 << 20, "zstd"}} {
		clusterSize := c.clusterSize
		t.Run(fmt.Sprint(clusterSize, c.kind), func(t *testing.T) {
			t.Parallel()
			size := max(2*clusterSize, 128<<10)
			content := make([]byte, size)
			rng := rand.New(rand.NewPCG(1, uint64(clusterSize)))
			for i := range content { // compresses a little
				content[i] = "abcdefgh"[rng.IntN(8)]
			}
			raw := filepath.Join(t.TempDir(), "raw")
			must(t, os.WriteFile(raw, content, 0o600))
			path := filepath.Join(t.TempDir(), "image.qcow2")
			qemuImg(t, "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", fmt.Sprintf("cluster_size=%d,compression_type=%s", clusterSize, c.kind), raw, path)
			f, err := os.ReadFile(path)
			must(t, err)

			h, err := DecodeHeader(f)
			must(t, err)
			g := h.Geometry()
			z := Decompressor{Kind: h.CompressionType}
			dst := make([]byte, clusterSize)
			compressed := 0
			for guest := GuestOffset(0); int(guest) < size; guest = guest.Plus(int64(clusterSize)) {
				l2 := int64(binary.BigEndian.Uint64(f[h.L1Offset.Plus(8*g.L1Index(guest)):]) & OffsetMask)
				e := g.Table(f[l2:]).Entry(g.L2Index(guest))
				if e.Kind() != KindCompressed {
					continue
				}
				compressed++
				off, n := e.Compressed(g)
				must(t, z.Decompress(dst, f[off:min(int64(len(f)), int64(off)+n)]))
				if !bytes.Equal(dst, content[guest:guest.Plus(int64(clusterSize))]) {
					t.Fatalf("guest offset %#x: wrong content", guest)
				}
			}
			if compressed == 0 {
				t.Fatal("qemu-img compressed nothing")
			}
		})
	}
}
