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
		if err := send(c, reply, copies); err != nil {
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

// answer carries out a request. It takes over fds, or closes them. The descriptors that it returns are the holder's.
func (h *holder) answer(m message, fds []int) (reply message, copies []int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	defer h.note()
	keep := false
	defer func() {
		if !keep {
			Entry{FDs: fds}.Close()
		}
	}()
	if h.leaving {
		return message{Leaving: true}, nil
	}
	e, held := h.entries[m.Name]
	switch m.Op {
	case opHold:
		if held || m.Name == "" {
			return message{Error: fmt.Sprintf("%q is held already", m.Name)}, nil
		}
		h.entries[m.Name] = Entry{State: m.State, FDs: fds}
		keep = true
	case opGet:
		if held {
			return message{Name: m.Name, State: e.State}, e.FDs
		}
	case opDrop:
		e.Close()
		delete(h.entries, m.Name)
	case opList:
		return message{Names: slices.Sorted(maps.Keys(h.entries))}, nil
	case opGuard:
	default:
		return message{Error: fmt.Sprintf("unknown operation %q", m.Op)}, nil
	}
	return message{}, nil
}
