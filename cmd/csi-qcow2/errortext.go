package main

import (
	"context"
	"errors"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/csi-qcow2/csi-qcow2/pkg/driver"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// plainError is an error of a kind that has a text of its own.
type plainError struct {
	text string
	kind error
}

func (e plainError) Error() string { return e.text }
func (e plainError) Unwrap() error { return e.kind }

// sentence writes an error for people: in one line, no part of it twice, without words of Go's and gRPC's, and with nothing in it
// that a terminal would take for a command.
func sentence(err error) string {
	text := regexp.MustCompile(`rpc error: code = \w+ desc = `).ReplaceAllString(err.Error(), "")
	for _, r := range []struct{ from, to string }{
		{context.Canceled.Error(), "it was interrupted"},
		{context.DeadlineExceeded.Error(), "it took too long"},
		{"transport: Error while dialing: ", ""},
	} {
		text = strings.ReplaceAll(text, r.from, r.to)
	}
	lines := strings.Split(text, "\n") // of errors that were joined
	for i, line := range lines {
		lines[i] = withoutRepeats(line)
	}
	lines = slices.DeleteFunc(slices.Compact(lines), func(line string) bool { return line == "" })
	if errors.Is(err, qcow2.ErrNeedsRepair) {
		lines = append(lines, driver.RepairHint)
	}
	return escape(strings.Join(lines, "; "))
}

// withoutRepeats leaves out what an error says again: "open x: open x: no such file".
func withoutRepeats(line string) string {
	var parts []string
	for part := range strings.SplitSeq(line, ": ") {
		if !slices.Contains(parts, part) {
			parts = append(parts, part)
		}
	}
	return strings.Join(parts, ": ")
}

// escape writes what is not printable in a text as Go does in a string.
func escape(text string) string {
	var b strings.Builder
	for _, r := range text {
		if unicode.IsPrint(r) && r != unicode.ReplacementChar {
			b.WriteRune(r)
			continue
		}
		quoted := strconv.QuoteRune(r)
		b.WriteString(quoted[1 : len(quoted)-1])
	}
	return b.String()
}

// interruption says that a signal ended the work, and what else went wrong.
func interruption(err error) string {
	if errors.Is(err, context.Canceled) {
		return "interrupted"
	}
	return "interrupted: " + sentence(err)
}
