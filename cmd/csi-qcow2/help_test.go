package main

import (
	"bytes"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

// TestHelp checks that every command that people use explains itself, and that its usage line names as many
// arguments as it takes.
func TestHelp(t *testing.T) {
	var visit func(*cobra.Command)
	visit = func(c *cobra.Command) {
		t.Run(c.CommandPath(), func(t *testing.T) {
			arguments := make([]string, len(strings.Fields(c.Use))-1)
			switch {
			case c.Short == "" || strings.HasSuffix(c.Short, "."):
				t.Errorf("its short help is %q", c.Short)
			case c.Args == nil || c.Args(c, arguments) != nil:
				t.Errorf("it does not take the arguments of %q", c.Use)
			case c.Args(c, make([]string, len(arguments)+1)) == nil:
				t.Errorf("it takes more arguments than those of %q", c.Use)
			}
			for line := range strings.Lines(c.Long + "\n" + c.Example) {
				if len([]rune(line)) > 115 {
					t.Errorf("a line of its help is long: %s", line)
				}
			}
		})
		for _, sub := range c.Commands() {
			visit(sub)
		}
	}
	visit(newRootCommand())
}

// TestHelpFits: a help is as wide as a terminal of 80 columns, but for examples, which are to be copied.
func TestHelpFits(t *testing.T) {
	var visit func(*cobra.Command)
	visit = func(c *cobra.Command) {
		if c.Hidden {
			return
		}
		var out bytes.Buffer
		c.SetOut(&out)
		printHelp(c, nil)
		for line := range strings.Lines(strings.Replace(out.String(), c.Example, "", 1)) {
			if utf8.RuneCountInString(strings.TrimSuffix(line, "\n")) > 80 {
				t.Errorf("%s: %s", c.CommandPath(), line)
			}
		}
		for _, sub := range c.Commands() {
			visit(sub)
		}
	}
	visit(newRootCommand())
	if got, want := folded("one two\nthree\n\n  kept as it is\nfour", 9), "one two\nthree\n\n  kept as it is\nfour"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
