package holder

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// ErrNotHeld is returned by Get for a name that the holder does not know.
var ErrNotHeld = errors.New("not held")

// retryPause is how often a client tries a holder that is not there: one may be taking over from another.
const retryPause = 5 * time.Millisecond

// Client talks to the holder that listens at a path. While there is none, its calls wait for one until their context ends.
type Client struct{ Path string }

// Hold gives the holder copies of an entry's descriptors. It fails if the name is taken.
func (c Client) Hold(ctx context.Context, name string, e Entry) error {
	_, fds, err := c.call(ctx, message{Op: opHold, Name: name, State: e.State, Last: e.Last}, e.FDs)
	Entry{FDs: fds}.Close()
	return err
}

// Get returns an entry, whose descriptors are the caller's. ErrNotHeld.
func (c Client) Get(ctx context.Context, name string) (Entry, error) {
	m, fds, err := c.call(ctx, message{Op: opGet, Name: name}, nil)
	if err == nil && m.Name == "" {
		err = fmt.Errorf("%s: %w", name, ErrNotHeld)
	}
	return Entry{State: m.State, FDs: fds, Last: m.Last}, err
}

// Drop makes the holder close what it has under a name, if anything.
func (c Client) Drop(ctx context.Context, name string) error {
	_, _, err := c.call(ctx, message{Op: opDrop, Name: name}, nil)
	return err
}

// List returns the names, sorted.
func (c Client) List(ctx context.Context) ([]string, error) {
	m, _, err := c.call(ctx, message{Op: opList}, nil)
	return m.Names, err
}

// Guard tells the holder that somebody serves what it holds, until ctx ends.
func (c Client) Guard(ctx context.Context) {
	for ctx.Err() == nil {
		_ = c.guardOnce(ctx)
		pause(ctx)
	}
}

func (c Client) guardOnce(ctx context.Context) error {
	conn, err := dial(ctx, c.Path)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := send(conn, message{Op: opGuard}, nil); err != nil {
		return err
	}
	for {
		if _, _, err := receive(conn); err != nil {
			return err
		}
	}
}

// call makes one request, of whichever holder is there.
func (c Client) call(ctx context.Context, m message, fds []int) (message, []int, error) {
	for {
		reply, got, err := c.try(ctx, m, fds)
		switch {
		case err == nil && reply.Error != "":
			return reply, got, fmt.Errorf("holder: %s", reply.Error)
		case err == nil && !reply.Leaving:
			return reply, got, nil
		case err != nil && !unheard(err):
			return reply, nil, err
		}
		if !pause(ctx) {
			return message{}, nil, errors.Join(ctx.Err(), err)
		}
	}
}

// unheard tells that no holder has read the request: none listens, or it left before.
func unheard(err error) bool {
	return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.EPIPE) || errors.Is(err, unix.ECONNRESET)
}

func (c Client) try(ctx context.Context, m message, fds []int) (message, []int, error) {
	conn, err := dial(ctx, c.Path)
	if err != nil {
		return message{}, nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := send(conn, m, fds); err != nil {
		return message{}, nil, fmt.Errorf("holder: %w", err)
	}
	reply, got, err := receive(conn)
	if err != nil {
		return message{}, nil, fmt.Errorf("holder does not answer: %w", err)
	}
	return reply, got, nil
}

// pause waits a little, and tells whether ctx still runs.
func pause(ctx context.Context) bool {
	t := time.NewTimer(retryPause)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
