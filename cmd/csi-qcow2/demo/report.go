package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

const (
	maxWidth  = 80 // columns, of all lines that are ours
	timeWidth = len("12345.67 s")
	margin    = "     "
)

// Colours, as a terminal is told them.
const (
	bold  = "1"
	dim   = "2"
	red   = "31"
	green = "32"
	cyan  = "36"
)

// report shows the steps, each with its number, the time that it took and what it found. After a step
// has failed, nothing more is done.
type report struct {
	w      io.Writer
	colour bool
	width  int                     // columns
	pause  func(next string) error // nil: it goes on by itself
	steps  int
	err    error // of the step that failed
}

// paint returns a text in a colour, where there are colours.
func (r *report) paint(colour, text string) string {
	if !r.colour || text == "" {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

func (r *report) title(text string) {
	if r.err == nil {
		fmt.Fprintf(r.w, "\n%s\n", r.paint(bold, text))
	}
}

// note shows a remark below a step.
func (r *report) note(text string) {
	if r.err == nil {
		fmt.Fprintln(r.w, margin+r.paint(dim, folded(text, r.width, margin)))
	}
}

// inCluster shows the command by which a user of a cluster causes what the step does.
func (r *report) inCluster(command string) { r.note("in a cluster: " + command) }

// wait waits for the user, if there is one, who is told what comes next.
func (r *report) wait(next string) {
	if r.err == nil && r.pause != nil {
		r.err = r.pause(fmt.Sprintf("%.*s", r.width-len(margin+"[Enter]  … "), next))
	}
}

// step does one step and shows it. What do returns is shown below.
func (r *report) step(what string, do func() (string, error)) {
	if r.wait(what); r.err != nil {
		return
	}
	r.steps++
	fmt.Fprintf(r.w, "%3d  %-*s ", r.steps, r.width-len(margin)-timeWidth-1, what)
	start := time.Now()
	result, err := do()
	took := fmt.Sprintf("%*.2f s", timeWidth-len(" s"), time.Since(start).Seconds())
	if err != nil {
		how := "FAILED"
		if errors.Is(err, context.Canceled) || status.Code(err) == codes.Canceled {
			how = "interrupted"
		}
		fmt.Fprintf(r.w, "%s\n%s%s\n", took, margin, r.paint(red, how))
		r.err = fmt.Errorf("step %d, %s: %w", r.steps, what, err)
		return
	}
	fmt.Fprintln(r.w, r.paint(dim, took))
	if result != "" {
		fmt.Fprintln(r.w, margin+r.paint(green, result))
	}
}

// command runs what a user would type, and shows it with its output.
func (r *report) command(words []string, run func() (string, error)) {
	if r.wait(strings.Join(words[:min(len(words), 4)], " ")); r.err != nil {
		return
	}
	fmt.Fprintf(r.w, "\n%s\n", r.paint(cyan, "$ "+wrapped(words, r.width)))
	out, err := run()
	if err != nil {
		r.err = err
		return
	}
	for line := range strings.Lines(out) {
		fmt.Fprintln(r.w, strings.TrimRight(line, " \n"))
	}
}

// folded breaks a text, the first line of which begins in the column where margin ends, into lines of at most width columns.
func folded(text string, width int, margin string) string {
	return joined(strings.Fields(text), width, len(margin), "\n"+margin)
}

// wrapped joins the words of a command, in lines of at most width columns that a shell takes for one.
func wrapped(words []string, width int) string { return joined(words, width, len("$ "), " \\\n    ") }

// joined joins words, from a column on, in lines of at most width columns. Between two lines comes newLine.
func joined(words []string, width, column int, newLine string) string {
	end, margin, _ := strings.Cut(newLine, "\n")
	var b strings.Builder
	for i, word := range words {
		switch {
		case i == 0:
		case column+1+len(word)+len(end) > width:
			b.WriteString(newLine)
			column = len(margin)
		default:
			b.WriteByte(' ')
			column++
		}
		b.WriteString(word)
		column += len(word)
	}
	return b.String()
}
