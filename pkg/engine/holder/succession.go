package holder

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"
)

// bequeathPatience is how long a successor may take to accept everything.
const bequeathPatience = 10 * time.Second

// heir is a holder that waits to take over.
type heir struct {
	conn *net.UnixConn
	done chan struct{} // closed when it has, or could not
}

// await offers the connection's other end as a successor, until it has succeeded or this holder has ended.
func (h *holder) await(c *net.UnixConn) {
	successor := heir{c, make(chan struct{})}
	select {
	case h.heirs <- successor:
		<-successor.done
	case <-h.ended:
	}
}

// bequeath gives a successor everything, and tells whether it has it.
func (h *holder) bequeath(to heir) bool {
	defer close(to.done)
	h.mu.Lock()
	defer h.mu.Unlock() // requests wait, and are then sent on
	h.leaving = true
	if err := h.sendAll(to.conn); err != nil {
		klog.ErrorS(err, "The successor did not take over")
		h.leaving = false
		return false
	}
	klog.InfoS("A successor has taken over", "held", len(h.entries))
	return true
}

// sendAll is called with mu held.
func (h *holder) sendAll(c *net.UnixConn) error {
	if err := c.SetDeadline(time.Now().Add(bequeathPatience)); err != nil {
		return err
	}
	for name, e := range h.entries {
		if err := send(c, message{Name: name, State: e.State, Last: e.Last}, e.FDs); err != nil {
			return err
		}
	}
	if err := send(c, message{Done: true}, nil); err != nil {
		return err
	}
	m, fds, err := receive(c)
	Entry{FDs: fds}.Close()
	if err == nil && !m.Done {
		err = errors.New("it has not got everything")
	}
	return err
}

// succeed waits for a holder that listens at the socket to leave, and takes over what it holds. It returns at once if there
// is none, and when ctx ends.
func (h *holder) succeed(ctx context.Context) error {
	for ctx.Err() == nil {
		c, err := dial(ctx, h.options.Socket)
		if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, os.ErrNotExist) || errors.Is(err, context.Canceled) {
			return nil
		}
		if err != nil {
			return err
		}
		stop := context.AfterFunc(ctx, func() { c.Close() })
		err = h.inherit(c)
		stop()
		c.Close()
		if err == nil {
			return nil
		}
		closeAll(h.entries)
		clear(h.entries)
		klog.V(2).InfoS("The holder before has ended without a word", "reason", err)
	}
	return nil
}

// inherit receives everything from the holder at the other end, when that one leaves.
func (h *holder) inherit(c *net.UnixConn) error {
	if err := send(c, message{Op: opSucceed}, nil); err != nil {
		return err
	}
	klog.InfoS("Waiting for the running holder to leave", "socket", h.options.Socket)
	for {
		m, fds, err := receive(c)
		if err != nil {
			return err
		}
		if m.Done {
			return send(c, message{Done: true}, nil)
		}
		h.entries[m.Name] = Entry{State: m.State, FDs: fds, Last: m.Last}.settled()
	}
}

func dial(ctx context.Context, path string) (*net.UnixConn, error) {
	c, err := new(net.Dialer).DialContext(ctx, "unixpacket", path)
	if err != nil {
		return nil, fmt.Errorf("holder: %w", err)
	}
	return c.(*net.UnixConn), nil
}
