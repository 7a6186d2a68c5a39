package format

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// Compression types (specification: "Header", byte 104).
const (
	compressionDeflate = 0
	CompressionZstd    = 1
)

// ErrContent tells damaged content apart from damaged metadata.
var ErrContent = errors.New("damaged content")

// Decompressor decompresses an image's clusters. It is safe for concurrent use and keeps idle streams, each with its
// window, for the next cluster.
type Decompressor struct {
	Kind uint8     // compression type
	idle sync.Pool // of *decompressStream
}

// decompressStream is a decoder and the reader that it is bound to.
type decompressStream struct {
	src     bytes.Reader
	decoder io.Reader
	reset   func(*bytes.Reader) error
}

// zstdWindow is the largest window that a zstd decoder must know (RFC 8878), and that ours makes room for.
const zstdWindow = 8 << 20

// newDecompressStream makes a decoder for clusters of size bytes.
func newDecompressStream(kind uint8, size int) (*decompressStream, error) {
	s := new(decompressStream)
	if kind == CompressionZstd {
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(uint64(max(size, zstdWindow))))
		if err != nil {
			return nil, fmt.Errorf("make a zstd decompressor: %w", err)
		}
		s.decoder, s.reset = d, func(r *bytes.Reader) error { return d.Reset(r) }
		return s, nil
	}
	d := flate.NewReader(&s.src)
	s.decoder, s.reset = d, func(r *bytes.Reader) error { return d.(flate.Resetter).Reset(r, nil) }
	return s, nil
}

// Decompress fills dst, exactly one cluster, from src, the bytes that a compressed L2 entry names: raw deflate or
// zstd, padded to whole sectors and possibly cut at the end of the file. It never produces more than len(dst)
// bytes, whatever the stream holds; a stream that is broken or yields less is ErrCorrupt, and dst is then undefined.
func (z *Decompressor) Decompress(dst, src []byte) error {
	s, ok := z.idle.Get().(*decompressStream)
	if !ok {
		var err error
		if s, err = newDecompressStream(z.Kind, len(dst)); err != nil {
			return err
		}
	}
	defer z.idle.Put(s)
	defer s.src.Reset(nil) // the caller owns src

	if z.Kind == CompressionZstd {
		src = narrowWindow(src, len(dst))
	}
	s.src.Reset(src)
	err := s.reset(&s.src)
	n := 0
	if err == nil {
		n, err = io.ReadFull(s.decoder, dst)
	}
	if err != nil {
		return fmt.Errorf("%w: %w: compressed cluster of %d bytes yields %d of %d: %w", ErrCorrupt, ErrContent, len(src), n, len(dst), err)
	}
	return nil
}

// narrowWindow returns a zstd frame with a window that is no larger than its content of size bytes, a power of two, can use. A
// stream whose encoder did not know the size asks for as much as its level has, up to 128 MiB.
func narrowWindow(frame []byte, size int) []byte {
	const magic, descriptor, window = 0xfd2fb528, 4, 5 // offsets in the frame
	const singleSegment = 1 << 5                       // there is no window
	const maxBlock = 128 << 10                         // a block is no larger than the window
	if len(frame) <= window || binary.LittleEndian.Uint32(frame) != magic || frame[descriptor]&singleSegment != 0 {
		return frame
	}
	enough := byte(bits.Len(uint(max(size, maxBlock)))-1-10) << 3
	if frame[window] <= enough {
		return frame
	}
	frame = bytes.Clone(frame)
	frame[window] = enough
	return frame
}
