package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

func newRootCommand() *cobra.Command {
	root := newGroup("csi-qcow2", "Kubernetes volumes that are qcow2 images, with internal snapshots",
		`csi-qcow2 turns a directory of a node into Kubernetes volumes. Each volume is one qcow2 image, each
VolumeSnapshot an internal snapshot of it.

On a node run "holder", which keeps the block devices, "engine", which serves them, and "node", the CSI
plugin, on one pool.
For administrators there are "pool", "volume" and "image"; an image that is not attached can also be handled
with QEMU's own tools at any time.`,
		newNodeCommand(), newEngineCommand(), newHolderCommand(), newPoolCommand(), newVolumeCommand(), newImageCommand(), newDemoCommand(), newWorkerCommand(),
		newHelperCommand(), newVersionCommand(), newManCommand())
	root.Version = version
	root.SilenceErrors = true // exitStatus prints them
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		var invalid *pflag.InvalidValueError
		if errors.As(err, &invalid) {
			err = fmt.Errorf("--%s: %w", invalid.GetFlag().Name, errors.Unwrap(invalid))
		}
		return wrongUsage(cmd, fmt.Errorf("%w (see %s --help)", err, cmd.CommandPath()))
	})
	root.SetVersionTemplate("csi-qcow2 {{.Version}}\n")
	root.SetHelpFunc(printHelp)
	addCompletions(root)
	return root
}

// newGroup returns a command that only holds others: alone it prints its help, and a subcommand that it
// does not have is an error.
func newGroup(use, short, long string, commands ...*cobra.Command) *cobra.Command {
	group := &cobra.Command{
		Use: use, Short: short, Long: long,
		Args:         noSuchCommand,
		SilenceUsage: true,
		RunE:         func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	group.AddCommand(commands...)
	return group
}

// noSuchCommand is the error of a command that a group does not have, with the one that was probably meant.
func noSuchCommand(group *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	message := fmt.Sprintf("%s has no command %q", group.CommandPath(), args[0])
	group.SuggestionsMinimumDistance = 2
	if likely := group.SuggestionsFor(args[0]); len(likely) > 0 {
		message += fmt.Sprintf("; did you mean %s?", strings.Join(likely, " or "))
	}
	return wrongUsage(group, fmt.Errorf("%s (see %s --help)", message, group.CommandPath()))
}

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
