package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"unicode"

	"github.com/spf13/cobra"
)

// outputFlag is -o: what a command prints is a table for people or JSON for programs.
type outputFlag struct{ json bool }

func addOutputFlag(cmd *cobra.Command) *outputFlag {
	o := new(outputFlag)
	cmd.Flags().VarP(o, "output", "o", `"table" for people or "json" for programs`)
	return o
}

func (o *outputFlag) Type() string { return "format" }

func (o *outputFlag) String() string {
	if o.json {
		return "json"
	}
	return "table"
}

func (o *outputFlag) Set(s string) error {
	if s != "table" && s != "json" {
		return fmt.Errorf("%q is neither table nor json", s)
	}
	o.json = s == "json"
	return nil
}

// print writes value as JSON, or what table writes in columns separated by tabs.
func (o *outputFlag) print(w io.Writer, value any, table func(w io.Writer)) error {
	if o.json {
		e := json.NewEncoder(w)
		e.SetIndent("", "  ")
		return e.Encode(value)
	}
	columns := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	table(columns)
	return columns.Flush()
}

// printable returns a string out of an image as it can go to a terminal: what could move the cursor or
// break a table is escaped.
func printable(s string) string {
	quote := func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }
	if s == "" || strings.ContainsFunc(s, quote) {
		return fmt.Sprintf("%q", s)
	}
	return s
}
