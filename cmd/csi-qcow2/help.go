package main

import (
	"cmp"
	"fmt"
	"strings"
	"unicode/utf8"

	"github.com/spf13/cobra"
)

// helpWidth is the most columns that a help has: longer lines are hard to read.
const helpWidth = 100

// printHelp prints the help of a command as wide as the terminal is.
func printHelp(cmd *cobra.Command, _ []string) {
	w := cmd.OutOrStdout()
	width := min(widthOf(w), helpWidth)
	fmt.Fprintf(w, "%s\n\n", folded(cmp.Or(cmd.Long, cmd.Short), width))
	cmd.SetUsageTemplate(strings.NewReplacer(
		"Flags.FlagUsages ", fmt.Sprintf("Flags.FlagUsagesWrapped %d ", width),
		" for more information about a command.", " for more.",
	).Replace(cmd.UsageTemplate()))
	fmt.Fprint(w, cmd.UsageString())
}

// folded breaks the paragraphs of a text into lines of at most width columns. A line that begins with a space stays as it is.
func folded(text string, width int) string {
	var out []string
	column := 0 // 0: the next word begins a line
	for line := range strings.SplitSeq(text, "\n") {
		if line == "" || line[0] == ' ' {
			out, column = append(out, line), 0
			continue
		}
		for word := range strings.FieldsSeq(line) {
			n := utf8.RuneCountInString(word)
			if column > 0 && column+1+n <= width {
				out[len(out)-1] += " " + word
				column += 1 + n
				continue
			}
			out, column = append(out, word), n
		}
	}
	return strings.Join(out, "\n")
}
