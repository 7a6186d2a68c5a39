package qcow2

import (
	"bytes"
	"compress/flate"
	"fmt"
	"io"
	"sync"
)

// inflater decompresses clusters. The zero value is ready; it is safe for concurrent use and keeps
// idle decompressors, each with its 32 KiB window, for the next cluster.
type inflater struct {
	idle sync.Pool // of *inflateStream
}

// inflateStream is a decompressor and the reader that it is bound to.
type inflateStream struct {
	src     bytes.Reader
	decoder io.ReadCloser // a flate decoder, which is a flate.Resetter too
}

// inflate fills dst, exactly one cluster, from src, the bytes that a compressed L2 entry names: raw
// deflate, padded to whole sectors and possibly cut at the end of the file. It never produces more
// than len(dst) bytes, whatever the stream holds; a stream that is broken or yields less is ErrCorrupt,
// and dst is then undefined.
func (z *inflater) inflate(dst, src []byte) error {
	s, ok := z.idle.Get().(*inflateStream)
	if !ok {
		s = new(inflateStream)
		s.decoder = flate.NewReader(&s.src)
	}
	defer z.idle.Put(s)
	defer s.src.Reset(nil) // the caller owns src

	s.src.Reset(src)
	if err := s.decoder.(flate.Resetter).Reset(&s.src, nil); err != nil {
		return fmt.Errorf("reset the decompressor: %w", err)
	}
	if n, err := io.ReadFull(s.decoder, dst); err != nil {
		return fmt.Errorf("%w: compressed cluster of %d bytes yields %d of %d: %w", ErrCorrupt, len(src), n, len(dst), err)
	}
	return nil
}
