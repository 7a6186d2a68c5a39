package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
)

// usageError is a mistake in the command line. The program ends with the exit status 2.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// wrongUsage makes a usageError of err. But 2 is what `image check` says of a corrupt image: there it is 1, not checked.
func wrongUsage(cmd *cobra.Command, err error) error {
	if cmd.Name() == checkCommand {
		return err
	}
	return usageError{err}
}

// takes checks that a command gets the arguments that its usage line names in capitals; those in brackets may be left out.
func takes(names ...string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		least := len(names)
		for least > 0 && strings.HasPrefix(names[least-1], "[") {
			least--
		}
		if len(args) >= least && len(args) <= len(names) {
			return nil
		}
		return wrongUsage(cmd, fmt.Errorf("usage: %s %s (it was given %d arguments; see --help)",
			cmd.CommandPath(), strings.Join(names, " "), len(args)))
	}
}

// statusError ends the program with an exit status of its own; what there is to say has been printed.
type statusError int

func (e statusError) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// exitStatus prints err for people and returns the exit status that it stands for.
func exitStatus(ctx context.Context, w io.Writer, err error) int {
	var status statusError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &status):
		return int(status)
	case ctx.Err() != nil:
		fmt.Fprintf(w, "csi-qcow2: %s\n", interruption(err))
		return 1
	}
	fmt.Fprintf(w, "csi-qcow2: %s\n", sentence(err))
	var usage usageError
	if errors.As(err, &usage) {
		return 2
	}
	return 1
}
