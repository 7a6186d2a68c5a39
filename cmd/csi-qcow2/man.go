package main

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// newManCommand is what `make man` runs.
func newManCommand() *cobra.Command {
	return &cobra.Command{
		Use:    "man DIR",
		Short:  "Write a manual page of each command",
		Hidden: true,
		Args:   takes("DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := os.MkdirAll(args[0], 0o755); err != nil {
				return err
			}
			return writeManuals(cmd.Root(), args[0])
		},
	}
}

// writeManuals writes the page of a command that is for people, and of those below it.
func writeManuals(cmd *cobra.Command, dir string) error {
	if cmd.Hidden {
		return nil
	}
	var b strings.Builder
	manual(&b, cmd)
	if err := os.WriteFile(filepath.Join(dir, pageName(cmd)+".1"), []byte(b.String()), 0o644); err != nil {
		return err
	}
	for _, sub := range cmd.Commands() {
		if err := writeManuals(sub, dir); err != nil {
			return err
		}
	}
	return nil
}

func pageName(cmd *cobra.Command) string { return strings.ReplaceAll(cmd.CommandPath(), " ", "-") }

// manual writes the page of a command in man(7).
func manual(w io.Writer, cmd *cobra.Command) {
	fmt.Fprintf(w, ".TH %s 1 \"\" \"csi-qcow2 %s\" \"csi-qcow2\"\n", roff(strings.ToUpper(pageName(cmd))), roff(version))
	fmt.Fprintf(w, ".SH NAME\n%s \\- %s\n", roff(pageName(cmd)), roff(cmd.Short))
	fmt.Fprintf(w, ".SH SYNOPSIS\n.B %s\n", roff(cmd.UseLine()))
	fmt.Fprintf(w, ".SH DESCRIPTION\n")
	for line := range strings.Lines(cmd.Long + "\n") {
		switch text := strings.TrimRight(line, "\n"); {
		case text == "":
			fmt.Fprintln(w, ".PP")
		case strings.HasPrefix(text, "  "): // a list that was laid out by hand
			fmt.Fprintf(w, ".br\n%s\n", strings.ReplaceAll(roff(text), " ", `\ `))
		default:
			fmt.Fprintln(w, roff(text))
		}
	}
	section := func(title string, flags *pflag.FlagSet) {
		if flags.HasAvailableFlags() {
			fmt.Fprintf(w, ".SH %s\n", title)
			flags.VisitAll(func(f *pflag.Flag) { manualFlag(w, f) })
		}
	}
	section("OPTIONS", cmd.NonInheritedFlags())
	if cmd.Example != "" {
		fmt.Fprintf(w, ".SH EXAMPLES\n.nf\n")
		for line := range strings.Lines(cmd.Example + "\n") {
			fmt.Fprintln(w, roff(strings.TrimRight(line, "\n")))
		}
		fmt.Fprintln(w, ".fi")
	}
	manualSeeAlso(w, cmd)
}

func manualFlag(w io.Writer, f *pflag.Flag) {
	if f.Hidden {
		return
	}
	name, usage := pflag.UnquoteUsage(f)
	flag := "--" + f.Name
	if f.Shorthand != "" {
		flag = "-" + f.Shorthand + ", " + flag
	}
	if name != "" {
		flag += " " + name
	}
	if zero := f.DefValue; zero != "" && zero != "false" && zero != "0" {
		usage += fmt.Sprintf(" (default %s)", zero)
	}
	fmt.Fprintf(w, ".TP\n.B %s\n%s\n", roff(flag), roff(usage))
}

func manualSeeAlso(w io.Writer, cmd *cobra.Command) {
	var others []string
	if cmd.HasParent() {
		others = append(others, pageName(cmd.Parent()))
	}
	for _, sub := range cmd.Commands() {
		if !sub.Hidden {
			others = append(others, pageName(sub))
		}
	}
	for i, name := range others {
		others[i] = ".BR " + roff(name) + " (1)"
	}
	fmt.Fprintf(w, ".SH SEE ALSO\n%s\n", strings.Join(others, " ,\n"))
}

// roff escapes a line of text: a backslash, a hyphen that is to be copied, a dot or a quote that would begin a request.
func roff(text string) string {
	text = strings.NewReplacer(`\`, `\e`, "-", `\-`, "\n", " ").Replace(text)
	if strings.HasPrefix(text, ".") || strings.HasPrefix(text, "'") {
		text = `\&` + text
	}
	return text
}
