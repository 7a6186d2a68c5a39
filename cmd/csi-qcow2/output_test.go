package main

import (
	"bytes"
	"strings"
	"testing"
	"time"
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
	p := newProgress(&out, "exporting x")
	p.update(50, 100)
	if out.Len() > 0 {
		t.Errorf("at once: %q", out.String())
	}
	p.started = p.started.Add(-10 * time.Second)
	for range 1000 {
		p.update(50, 100)
	}
	p.end()
	if got := out.String(); got != "exporting x:  50 %, 10s\n" {
		t.Errorf("after 10 s: %q", got)
	}

	out.Reset()
	p = newProgress(&out, "exporting x")
	p.terminal, p.started = true, p.started.Add(-10*time.Second)
	p.update(0, 0)
	p.update(100, 100)
	p.end()
	if got := out.String(); !strings.HasPrefix(got, "\r\x1b[Kexporting x: 100 %") || !strings.HasSuffix(got, "\r\x1b[K") {
		t.Errorf("on a terminal: %q", got)
	}
}
