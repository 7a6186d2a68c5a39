package demo

import (
	"strings"
	"testing"
)

// Each line that is ours fits the terminal, down to 60 columns.
func TestFolded(t *testing.T) {
	for width := 60; width <= maxWidth; width++ {
		for _, text := range proved() {
			got := folded(text, width, "   ")
			for i, line := range strings.Split("   "+got, "\n") {
				if len(line) > width || !strings.HasPrefix(line, "   ") {
					t.Errorf("in %d columns line %d is %q", width, i, line)
				}
			}
			if strings.Join(strings.Fields(got), " ") != text {
				t.Errorf("in %d columns %q became %q", width, text, got)
			}
		}
	}
}
