package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"
)

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
