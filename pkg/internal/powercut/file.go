package powercut

import "slices"

// content is what a file holds.
type content struct {
	data      []byte
	allocated int64 // bytes from the beginning that have blocks whatever data is, at least
}

func (c *content) resize(size int64) {
	if int64(len(c.data)) >= size {
		c.data = c.data[:size:size] // what is appended later is zeros again
	} else {
		c.data = append(c.data, make([]byte, size-int64(len(c.data)))...)
	}
}

// change is a change of a file's content.
type change struct {
	kind changeKind
	off  int64 // size, of a truncation
	n    int64
	data []byte
}

type changeKind uint8

const (
	write    changeKind = iota // of data at off
	zero                       // of n bytes at off, as far as the file reaches
	truncate                   // to off
	allocate                   // up to off, without changing the length
)

func (g change) apply(c *content) {
	switch g.kind {
	case write:
		c.resize(max(int64(len(c.data)), g.off+int64(len(g.data))))
		copy(c.data[g.off:], g.data)
	case zero:
		from, to := min(g.off, int64(len(c.data))), min(g.off+g.n, int64(len(c.data)))
		clear(c.data[from:to])
		c.allocated = min(c.allocated, g.off)
	case truncate:
		c.resize(g.off)
		c.allocated = min(c.allocated, g.off)
	case allocate:
		c.allocated = max(c.allocated, g.off)
	}
}

// fate is what a cut has made of a change.
type fate uint8

const (
	lost fate = iota
	kept
	lengthOnly // a write has made the file longer, with zeros
	torn       // some sectors of a write are there
)

const sector = 512

// fates tells how many may become of a change.
func (g change) fates() int {
	switch {
	case g.kind != write:
		return int(kept) + 1
	case len(g.data) <= sector:
		return int(lengthOnly) + 1
	default:
		return int(torn) + 1
	}
}

// suffer applies what is left of a change. coin decides about each sector of a torn write.
func (g change) suffer(c *content, f fate, coin func() bool) {
	switch f {
	case lost:
	case kept:
		g.apply(c)
	case lengthOnly:
		c.resize(max(int64(len(c.data)), g.off+int64(len(g.data))))
	case torn:
		for from := 0; from < len(g.data); {
			to := min(len(g.data), from+sector-int((g.off+int64(from))%sector))
			if coin() {
				change{kind: write, off: g.off + int64(from), data: g.data[from:to]}.apply(c)
			}
			from = to
		}
	}
}

func (c content) clone() content {
	return content{data: slices.Clone(c.data), allocated: c.allocated}
}
