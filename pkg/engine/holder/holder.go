// Package holder keeps file descriptors for processes that may die: a block device lives as long as its descriptors do. It
// knows nothing of what they are, does nothing else, and is not restarted when its users are.
//
// It listens on a unix socket for messages (SOCK_SEQPACKET) of JSON, with the descriptors beside them (SCM_RIGHTS). Each
// request has one reply; see protocol.go.
package holder

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/internal/unixsocket"
)

// Options of a holder.
type Options struct {
	// Socket is the path at which it listens, for root alone.
	Socket string
	// Patience is how long it keeps what nobody guards (Client.Guard): then users of the devices get errors instead of
	// waiting for ever. 0: for ever.
	Patience time.Duration
	// Ephemeral: it ends with ctx whatever it holds.
	Ephemeral bool
}

// Entry is what the holder keeps under a name.
type Entry struct {
	State []byte // whatever the descriptors' owner needs to know of them
	FDs   []int
	// Last: they are closed after those of entries without this mark when the holder ends, however it ends. The last close of a
	// block device waits for I/O, which must have an end by then.
	Last bool
}

// highFDs is where the numbers of descriptors begin that are not to be closed last: at the end of a process the kernel closes
// files from the highest number down.
const highFDs = 1 << 12

// settled returns the entry with descriptors in the right range, as far as there is room.
func (e Entry) settled() Entry {
	if e.Last {
		return e
	}
	for i, fd := range e.FDs {
		if fd >= highFDs {
			continue
		}
		if moved, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, highFDs); err == nil {
			unix.Close(fd)
			e.FDs[i] = moved
		}
	}
	return e
}

// duplicate returns an entry with descriptors of its own.
func (e Entry) duplicate() (Entry, error) {
	all := e.FDs
	e.FDs = nil
	for _, fd := range all {
		own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			e.Close()
			return Entry{}, fmt.Errorf("copy a descriptor: %w", err)
		}
		e.FDs = append(e.FDs, own)
	}
	return e, nil
}

// closeAll closes entries in the right order.
func closeAll(entries map[string]Entry) {
	for _, last := range []bool{false, true} {
		for _, e := range entries {
			if e.Last == last {
				e.Close()
			}
		}
	}
}

// Close closes the descriptors.
func (e Entry) Close() {
	unixsocket.CloseAll(e.FDs)
}

// Run holds what it is given until ctx ends, and then as long as it has anything that no successor has taken over. If a
// holder listens at the socket already it waits for that one to leave, and takes over.
func Run(ctx context.Context, o Options) error {
	h := &holder{
		options: o, entries: map[string]Entry{}, conns: map[*net.UnixConn]struct{}{},
		changed: make(chan struct{}, 1), heirs: make(chan heir), ended: make(chan struct{}),
	}
	defer h.end()
	if err := h.succeed(ctx); err != nil || ctx.Err() != nil {
		return err
	}
	for {
		l, err := unixsocket.Listen(context.WithoutCancel(ctx), "unixpacket", o.Socket)
		if err != nil {
			return err
		}
		klog.InfoS("Holder is listening", "socket", o.Socket, "held", h.names())
		h.serving.Go(func() { h.accept(l) })
		left := h.serve(ctx, l)
		l.Close()
		if left {
			return nil
		}
	}
}

type holder struct {
	options Options
	changed chan struct{}  // has a token when something of the below may have changed
	heirs   chan heir      // holders that wait to take over
	ended   chan struct{}  // closed when Run ends
	serving sync.WaitGroup // the listener's goroutine and the connections'

	mu      sync.Mutex // guards what follows
	entries map[string]Entry
	leaving bool // a successor is being given what there is
	guards  int
	conns   map[*net.UnixConn]struct{}
}

// serve returns true when there is nothing left to do: ctx has ended, and nothing is held or a successor has it. It returns
// false when a successor has failed to take over; the listener is closed then.
func (h *holder) serve(ctx context.Context, l *net.UnixListener) bool {
	stop := ctx.Done()
	var abandon <-chan time.Time
	var heirs chan heir // nil until ctx has ended
	for {
		select {
		case <-stop:
			stop, heirs = nil, h.heirs
			klog.InfoS("Holder stays until another takes over, or nothing is held", "held", h.names())
		case <-abandon:
			h.abandon()
		case <-h.changed:
		case heir := <-heirs:
			l.Close() // whoever comes from now on finds the successor
			return h.bequeath(heir)
		}
		h.mu.Lock()
		held, guarded := len(h.entries), h.guards > 0
		h.mu.Unlock()
		switch {
		case guarded || held == 0 || h.options.Patience == 0:
			abandon = nil
		case abandon == nil:
			abandon = time.After(h.options.Patience)
		}
		if ctx.Err() != nil && (held == 0 || h.options.Ephemeral) {
			return true
		}
	}
}

// abandon gives up everything: the users of the devices get errors.
func (h *holder) abandon() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.guards > 0 {
		return
	}
	for name := range h.entries {
		klog.ErrorS(nil, "No engine has come: giving up the device, its users get I/O errors", "name", name, "after", h.options.Patience)
	}
	closeAll(h.entries)
	clear(h.entries)
}

// end closes everything.
func (h *holder) end() {
	close(h.ended)
	h.mu.Lock()
	for c := range h.conns {
		_ = c.CloseRead() // what is being answered gets its answer
	}
	h.mu.Unlock()
	h.serving.Wait()
	closeAll(h.entries)
}

func (h *holder) names() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Sorted(maps.Keys(h.entries))
}

// note makes serve look again.
func (h *holder) note() {
	select {
	case h.changed <- struct{}{}:
	default:
	}
}
