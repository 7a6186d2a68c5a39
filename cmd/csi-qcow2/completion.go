package main

import (
	"strings"

	"github.com/spf13/cobra"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// addCompletions tells the shell what can follow, for cmd and all commands below.
func addCompletions(cmd *cobra.Command) {
	for flag, values := range map[string][]string{
		"output": {"table", "json"}, "repair": {"leaks", "all"}, "preallocation": {"off", "metadata", "falloc", "full"},
	} {
		if cmd.Flags().Lookup(flag) != nil {
			_ = cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)) // once a flag
		}
	}
	if cmd.Flags().Lookup("snapshot") != nil {
		_ = cmd.RegisterFlagCompletionFunc("snapshot", func(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return snapshotNames(args), cobra.ShellCompDirectiveNoFileComp
		})
	}
	switch words := strings.Fields(cmd.Use); {
	case len(words) == 1 && !cmd.HasSubCommands():
		cmd.ValidArgsFunction = cobra.NoFileCompletions
	case strings.HasPrefix(cmd.Use, "create FILE NAME"): // of a new one
		cmd.ValidArgsFunction = firstFile(func([]string) []string { return nil })
	case strings.Contains(cmd.Use, "FILE NAME"):
		cmd.ValidArgsFunction = firstFile(snapshotNames)
	case strings.Contains(cmd.Use, "FILE FROM [TO]"):
		cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, toComplete string) ([]cobra.Completion, cobra.ShellCompDirective) {
			return firstFile(snapshotNames)(cmd, args[:min(len(args), 1)], toComplete)
		}
	case strings.HasSuffix(cmd.CommandPath(), "volume show"):
		cmd.ValidArgsFunction = volumeNames
	}
	for _, sub := range cmd.Commands() {
		addCompletions(sub)
	}
}

// firstFile completes a file, and then, of that file, what second says.
func firstFile(second func(args []string) []string) cobra.CompletionFunc {
	return func(_ *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		switch len(args) {
		case 0:
			return nil, cobra.ShellCompDirectiveDefault
		case 1:
			return second(args), cobra.ShellCompDirectiveNoFileComp
		}
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
}

// snapshotNames returns the names of the snapshots of the image that is named first.
func snapshotNames(args []string) []string {
	if len(args) == 0 {
		return nil
	}
	img, err := qcow2.OpenShared(args[0])
	if err != nil {
		return nil
	}
	defer img.Close()
	var names []string
	for _, s := range img.Snapshots() {
		names = append(names, s.Name)
	}
	return names
}

// volumeNames completes the name of a volume.
func volumeNames(cmd *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
	dir, err := cmd.Flags().GetString("pool")
	if err != nil || len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	p, err := pool.Open(dir)
	if err != nil {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	volumes, _ := p.Volumes() // those that can be read
	var names []string
	for _, v := range volumes {
		names = append(names, v.Name)
	}
	return names, cobra.ShellCompDirectiveNoFileComp
}
