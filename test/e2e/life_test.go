package e2e

import (
	"testing"
)

// A volume is written by a pod, snapshotted, restored, and the restored one read.
func TestLife(t *testing.T) {
	for _, c := range []struct {
		name  string
		claim claim
		write string
		read  string
	}{
		{"ext4", claim{}, "echo hello >/data/file", "cat /DATA/file"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSpace(t)
			s.pvc("data", c.claim)
			s.pod("writer", nil, "data")
			s.ready("writer")
			s.exec("writer", c.write)
			s.snapshot("first", "data")
			s.exec("writer", "echo later >/data/file")
			restored := c.claim
			restored.source = fromSnapshot("first")
			s.pvc("copy", restored)
			s.pod("reader", nil, "copy")
			s.ready("reader")
			if got := s.exec("reader", "cat /copy/file"); got != "hello" {
				t.Errorf("the restored volume holds %q", got)
			}
		})
	}
}
