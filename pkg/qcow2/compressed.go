package qcow2

import (
	"bytes"
	"compress/flate"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"
)

// Compression types (specification: "Header", byte 104).
const (
	compressionDeflate = 0
	compressionZstd    = 1
)

// errContent tells damaged content apart from damaged metadata.
var errContent = errors.New("damaged content")

// decompressor decompresses an image's clusters. It is safe for concurrent use and keeps idle streams, each with its
// window, for the next cluster.
type decompressor struct {
	kind uint8     // compression type
	idle sync.Pool // of *decompressStream
}

// decompressStream is a decoder and the reader that it is bound to.
type decompressStream struct {
	src     bytes.Reader
	decoder io.Reader
	reset   func(*bytes.Reader) error
}

// newDecompressStream makes a decoder for clusters of size bytes; it needs no larger window.
func newDecompressStream(kind uint8, size int) (*decompressStream, error) {
	s := new(decompressStream)
	if kind == compressionZstd {
		d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(uint64(max(size, zstd.MinWindowSize))))
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

// decompress fills dst, exactly one cluster, from src, the bytes that a compressed L2 entry names: raw deflate or
// zstd, padded to whole sectors and possibly cut at the end of the file. It never produces more than len(dst)
// bytes, whatever the stream holds; a stream that is broken or yields less is ErrCorrupt, and dst is then undefined.
func (z *decompressor) decompress(dst, src []byte) error {
	s, ok := z.idle.Get().(*decompressStream)
	if !ok {
		var err error
		if s, err = newDecompressStream(z.kind, len(dst)); err != nil {
			return err
		}
	}
	defer z.idle.Put(s)
	defer s.src.Reset(nil) // the caller owns src

	s.src.Reset(src)
	err := s.reset(&s.src)
	n := 0
	if err == nil {
		n, err = io.ReadFull(s.decoder, dst)
	}
	if err != nil {
		return fmt.Errorf("%w: %w: compressed cluster of %d bytes yields %d of %d: %w", ErrCorrupt, errContent, len(src), n, len(dst), err)
	}
	return nil
}
