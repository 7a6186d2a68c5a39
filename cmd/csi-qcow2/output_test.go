package main

import (
	"bytes"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestPrintable(t *testing.T) {
	for s, want := range map[string]string{
		"snapshot-1": "snapshot-1", "Schnappschuß 1": "Schnappschuß 1", "": `""`,
		"a\tb": `"a\tb"`, "\x1b[2J": `"\x1b[2J"`, "\xff": `"\xff"`,
	} {
		if got := printable(s); got != want {
			t.Errorf("%q is shown as %s, want %s", s, got, want)
		}
	}
}

// TestProgress checks that quick work shows nothing, and long work a line now and then.
func TestProgress(t *testing.T) {
	var out bytes.Buffer
	p := newProgress(&out, "exporting", "x")
	p.update(50, 100)
	if out.Len() > 0 {
		t.Errorf("at once: %q", out.String())
	}
	p.started = p.started.Add(-10 * time.Second)
	for range 1000 {
		p.update(50<<20, 100<<20)
	}
	p.end()
	if got := out.String(); got != "exporting x:  50 %, 5 MiB/s, 10s left\n" {
		t.Errorf("after 10 s: %q", got)
	}

	out.Reset()
	p = newProgress(&out, "exporting", "x")
	p.terminal, p.started = true, p.started.Add(-10*time.Second)
	p.update(0, 0)
	p.update(100, 100)
	p.end()
	if got := out.String(); !strings.HasPrefix(got, "\r\x1b[Kexporting x [##########") || !strings.HasSuffix(got, "\r\x1b[K") {
		t.Errorf("on a terminal: %q", got)
	}
}

// TestProgressLine: a line fits the terminal, whatever its width and the name of the file; the bar goes first.
func TestProgressLine(t *testing.T) {
	const state = " 50 %, 120 MiB/s, 1m5s left"
	for width, want := range map[int]string{
		80: "exporting disk.qcow2 [##############---------------]  50 %, 120 MiB/s, 1m5s left",
		60: "exporting…isk.qcow2 [#####-----]  50 %, 120 MiB/s, 1m5s left",
		40: "expor….qcow2  50 %, 120 MiB/s, 1m5s left",
		20: "50 %",
	} {
		got := progressLine("exporting disk.qcow2", state, 0.5, width)
		if utf8.RuneCountInString(got) > width || got != want {
			t.Errorf("%d columns:\n%q, want\n%q", width, got, want)
		}
	}
	for width := 1; width < 200; width++ {
		for _, name := range []string{"x", strings.Repeat("ü", 300)} {
			if got := progressLine(name, state, 1, width); utf8.RuneCountInString(got) > width {
				t.Errorf("%q has more than %d columns", got, width)
			}
		}
	}
}

// Of a stream, whose length is not known, there is what has come, and how fast.
func TestProgressOfStream(t *testing.T) {
	var out strings.Builder
	p := newProgress(&out, "importing", "standard input")
	p.started = p.started.Add(-4 * time.Second)
	p.update(256<<20, 0)
	if !regexp.MustCompile(`^importing standard input: 256 MiB, [\d.]+ MiB/s\n$`).MatchString(out.String()) {
		t.Errorf("got %q", out.String())
	}
}
