package holder

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"slices"

	"k8s.io/klog/v2"
)

// accept serves connections until the listener is closed.
func (h *holder) accept(l *net.UnixListener) {
	for {
		c, err := l.AcceptUnix()
		if err != nil {
			if !errors.Is(err, net.ErrClosed) {
				klog.ErrorS(err, "Holder accepts no more connections")
			}
			return
		}
		h.mu.Lock()
		h.conns[c] = struct{}{}
		h.mu.Unlock()
		h.serving.Go(func() {
			if err := h.converse(c); err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
				klog.ErrorS(err, "A connection of the holder failed")
			}
			c.Close()
			h.mu.Lock()
			defer h.mu.Unlock()
			delete(h.conns, c)
		})
	}
}

// converse answers the requests of one connection.
func (h *holder) converse(c *net.UnixConn) error {
	guards := 0
	defer func() { h.guard(-guards) }()
	for {
		m, fds, err := receive(c)
		if err != nil {
			return err
		}
		switch m.Op {
		case opSucceed:
			h.await(c)
			return nil
		case opGuard:
			h.guard(1)
			guards++
		}
		reply, copies := h.answer(m, fds)
		err = send(c, reply, copies.FDs)
		copies.Close()
		if err != nil {
			return err
		}
	}
}

func (h *holder) guard(delta int) {
	h.mu.Lock()
	h.guards += delta
	h.mu.Unlock()
	h.note()
}

// answer carries out a request. It takes over fds, or closes them. The descriptors that it returns are the caller's.
func (h *holder) answer(m message, fds []int) (reply message, copies Entry) {
	unwanted := fds
	defer func() { Entry{FDs: unwanted}.Close() }() // when others need not wait for it
	h.mu.Lock()
	defer h.mu.Unlock()
	defer h.note()
	if h.leaving {
		return message{Leaving: true}, copies
	}
	e, held := h.entries[m.Name]
	switch m.Op {
	case opHold:
		if held || m.Name == "" {
			return message{Error: fmt.Sprintf("%q is held already", m.Name)}, copies
		}
		h.entries[m.Name] = Entry{State: m.State, FDs: fds, Last: m.Last}.settled()
		unwanted = nil
	case opGet:
		if held {
			copies, err := e.duplicate() // the entry may be dropped before they are sent
			if err != nil {
				return message{Error: err.Error()}, copies
			}
			return message{Name: m.Name, State: e.State, Last: e.Last}, copies
		}
	case opDrop:
		unwanted = append(unwanted, e.FDs...)
		delete(h.entries, m.Name)
	case opList:
		return message{Names: slices.Sorted(maps.Keys(h.entries))}, copies
	case opGuard:
	default:
		return message{Error: fmt.Sprintf("unknown operation %q", m.Op)}, copies
	}
	return message{}, copies
}
