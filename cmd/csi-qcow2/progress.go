package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

const (
	progressAfter    = 2 * time.Second // what takes less needs no progress
	progressTerminal = 200 * time.Millisecond
	progressLog      = 5 * time.Second

	defaultWidth = 80 // of a terminal that does not tell
	leastBar     = 10 // columns; a shorter bar says nothing
	leastWhat    = 12 // columns for what is done, before the bar goes
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

// newProgress returns the progress of a work on a file ("exporting", "x.qcow2"), in bytes, shown on w.
func newProgress(w io.Writer, doing, path string) *progress {
	return &progress{w: w, what: doing + " " + printable(path), terminal: isTerminal(w), started: time.Now()}
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok {
		return false
	}
	_, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	return err == nil
}

// widthOf returns how many columns a terminal has.
func widthOf(w io.Writer) int {
	if f, ok := w.(*os.File); ok {
		if size, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ); err == nil && size.Col > 0 {
			return int(size.Col)
		}
	}
	return defaultWidth
}

// update tells that done of total bytes are done; a total of 0 is not known. Many may call it at once.
func (p *progress) update(done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now, interval := time.Now(), progressLog
	if p.terminal {
		interval = progressTerminal
	}
	if done+total <= 0 || now.Sub(p.started) < progressAfter || now.Sub(p.last) < interval {
		return
	}
	p.last = now
	state := p.state(done, total, now.Sub(p.started))
	if p.terminal {
		p.shown = true
		width := widthOf(p.w) - 1 // the last column may wrap
		line := shortened(p.what+" "+state, width)
		if total > 0 {
			line = progressLine(p.what, state, float64(done)/float64(total), width)
		}
		fmt.Fprintf(p.w, "\r\x1b[K%s", line)
		return
	}
	fmt.Fprintf(p.w, "%s: %s\n", p.what, state)
}

// state says how far the work is, how fast, and how long it still takes if it goes on like that.
func (p *progress) state(done, total int64, elapsed time.Duration) string {
	state := humanSize(done)
	if total > 0 {
		state = fmt.Sprintf("%3.0f %%", 100*float64(done)/float64(total))
	}
	if seconds := elapsed.Seconds(); seconds > 0 {
		state += fmt.Sprintf(", %s/s", humanSize(int64(float64(done)/seconds)))
	}
	if done > 0 && total > 0 {
		left := time.Duration(float64(elapsed) * float64(total-done) / float64(done))
		state += fmt.Sprintf(", %v left", left.Round(time.Second))
	}
	return state
}

// progressLine lays a line out in at most width columns: what is done, a bar if there is room, and the state.
func progressLine(what, state string, part float64, width int) string {
	bar := width - utf8.RuneCountInString(what) - len(state) - len(" [] ")
	if bar < leastBar {
		room := width - len(state) - 1
		if room-leastBar-len("[] ") >= leastWhat {
			room -= leastBar + len("[] ")
			bar = leastBar
		}
		what = shortened(what, room)
	}
	line := what
	if bar >= leastBar {
		full := min(bar, int(part*float64(bar)))
		line += " [" + strings.Repeat("#", full) + strings.Repeat("-", bar-full) + "]"
	}
	if line += " " + state; utf8.RuneCountInString(line) > width {
		part, _, _ := strings.Cut(state, ",")
		return shortened(strings.TrimSpace(part), width)
	}
	return line
}

// shortened leaves out the middle of s, so that it has at most width columns.
func shortened(s string, width int) string {
	r := []rune(s)
	if width < 1 || len(r) <= width {
		return string(r[:max(0, min(len(r), width))])
	}
	head := (width - 1) / 2
	return string(r[:head]) + "…" + string(r[len(r)-(width-1-head):])
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
