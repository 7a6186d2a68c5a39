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

// report shows the steps, each with its number, the time that it took and what it found. After a step
// has failed, nothing more is done.
type report struct {
	w     io.Writer
	steps int
	err   error // of the step that failed
}

func (r *report) title(text string) {
	if r.err == nil {
		fmt.Fprintf(r.w, "\n%s\n", text)
	}
}

// note shows a remark between the steps.
func (r *report) note(text string) {
	if r.err == nil {
		fmt.Fprintf(r.w, "      %s\n", text)
	}
}

// step does one step and shows it. What do returns is shown behind the time.
func (r *report) step(what string, do func() (string, error)) {
	if r.err != nil {
		return
	}
	r.steps++
	fmt.Fprintf(r.w, "%4d  %-58s", r.steps, what)
	start := time.Now()
	result, err := do()
	took := time.Since(start).Seconds()
	if err != nil {
		how := "FAILED"
		if errors.Is(err, context.Canceled) || status.Code(err) == codes.Canceled {
			how = "interrupted"
		}
		fmt.Fprintf(r.w, " %6.2f s  %s\n", took, how)
		r.err = fmt.Errorf("step %d, %s: %w", r.steps, what, err)
		return
	}
	fmt.Fprintln(r.w, strings.TrimRight(fmt.Sprintf(" %6.2f s  %s", took, result), " "))
}

// quote shows what another program said.
func (r *report) quote(command, output string) {
	fmt.Fprintf(r.w, "\n  $ %s\n", command)
	for line := range strings.Lines(strings.TrimRight(output, "\n")) {
		fmt.Fprintf(r.w, "    %s\n", strings.TrimRight(line, "\n"))
	}
}
