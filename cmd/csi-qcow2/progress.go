package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	progressAfter    = 2 * time.Second // what takes less needs no progress
	progressTerminal = 200 * time.Millisecond
	progressLog      = 5 * time.Second
)

// progress tells on a terminal, or line by line in a log, how far a long work has come.
type progress struct {
	w        io.Writer
	what     string
	terminal bool
	started  time.Time

	mu    sync.Mutex // guards all below
	last  time.Time  // of the latest line
	shown bool       // on a terminal: the line is to be ended
}

// newProgress returns the progress of what ("exporting x.qcow2"), shown on w.
func newProgress(w io.Writer, what string) *progress {
	return &progress{w: w, what: what, terminal: isTerminal(w), started: time.Now()}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// update tells that done of total bytes, or whatever the unit is, are done. Many may call it at once.
func (p *progress) update(done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now, interval := time.Now(), progressLog
	if p.terminal {
		interval = progressTerminal
	}
	if total <= 0 || now.Sub(p.started) < progressAfter || now.Sub(p.last) < interval {
		return
	}
	p.last = now
	line := fmt.Sprintf("%s: %3.0f %%, %v", p.what, 100*float64(done)/float64(total), now.Sub(p.started).Round(time.Second))
	if p.terminal {
		p.shown = true
		fmt.Fprintf(p.w, "\r\x1b[K%s", line)
		return
	}
	fmt.Fprintln(p.w, line)
}

// end clears the line of a terminal.
func (p *progress) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.shown {
		fmt.Fprint(p.w, "\r\x1b[K")
		p.shown = false
	}
}
