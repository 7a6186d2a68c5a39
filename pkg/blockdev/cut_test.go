package blockdev

import (
	"bytes"
	"encoding/binary"
	"runtime/debug"
	"testing"

	"golang.org/x/sys/unix"
)

// cutMemory is two pages with a message in them of which a chosen byte begins the second page. Each page can be made read-only:
// what is stored to it then is not, and neither is what would have come behind. That is how far a process comes that dies there.
type cutMemory struct {
	pages []byte
	m     message
}

// newCutMemory makes a message whose byte at an offset from its page border is the first of the second page.
func newCutMemory(t *testing.T, border, payload int) cutMemory {
	t.Helper()
	page := unix.Getpagesize()
	b, err := unix.Mmap(-1, 0, 4*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	must(t, err)
	t.Cleanup(func() { must(t, unix.Munmap(b)) })
	// The message's page border is at 2 pages - border, so that what lies border bytes behind it is at 2 pages.
	return cutMemory{b, message(b[page-border:][:page+payload])}
}

// run does something to the message, with one half of its memory read-only, and tells whether that was in the way.
func (c cutMemory) run(t *testing.T, protectFirst bool, do func()) (cut bool) {
	t.Helper()
	page := unix.Getpagesize()
	half := c.pages[2*page:]
	if protectFirst {
		half = c.pages[:2*page]
	}
	must(t, unix.Mprotect(half, unix.PROT_READ))
	defer func() { must(t, unix.Mprotect(half, unix.PROT_READ|unix.PROT_WRITE)) }()
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if fault := recover(); fault != nil {
			if _, ok := fault.(interface{ Addr() uintptr }); !ok {
				panic(fault)
			}
			cut = true
		}
	}()
	do()
	return false
}

// Wherever a process dies, between any two stores to a message, the next one finds in it what the journal's rules promise.
func TestJournalCut(t *testing.T) {
	const payload = 512
	r := make(request, headRoom+payload)
	binary.NativeEndian.PutUint32(r, uint32(len(r)))
	binary.NativeEndian.PutUint32(r[4:], opWrite)
	binary.NativeEndian.PutUint64(r[8:], 77)
	binary.NativeEndian.PutUint32(r.args()[16:], payload)
	for i := range payload {
		r[headRoom+i] = byte(i + 1)
	}
	held := func(m message) bool { return *m.length() != 0 }
	concluded := func(m message) bool { return *m.outcome() != 0 }
	whole := func(m message) bool { return int(*m.length()) == len(r) && bytes.Equal(m.held(), r) }
	taken := func(m message) { m.take(r) }
	for _, op := range []struct {
		what   string
		before func(m message)
		do     func(m message)
		ok     func(m message) bool
	}{
		{"take", func(message) {}, taken, func(m message) bool { return !held(m) || whole(m) }},
		{"conclude", taken, func(m message) { m.conclude(writeOutSize, 0) }, func(m message) bool { return concluded(m) || whole(m) }},
		{
			"clear", func(m message) { taken(m); m.conclude(writeOutSize, 0) }, message.clear,
			func(m message) bool { return concluded(m) || !held(m) },
		},
	} {
		cuts := 0
		// Between the outcome and the length, the length and the rest of the request, in its head, before the data, in it.
		for _, border := range []int{-headRoom, 4 - headRoom, 40 - headRoom, -outHeaderSize, 0, 8, 256} {
			for _, first := range []bool{false, true} {
				c := newCutMemory(t, border, payload)
				op.before(c.m)
				if c.run(t, first, func() { op.do(c.m) }) {
					cuts++
				}
				if !op.ok(c.m) {
					t.Errorf("%s, cut at the first store %s byte %d: length %d, outcome %#x", op.what,
						map[bool]string{true: "before", false: "behind"}[first], border, *c.m.length(), *c.m.outcome())
				}
			}
		}
		if cuts < 4 {
			t.Errorf("%s was cut %d times: this test proves little", op.what, cuts)
		}
	}
}
