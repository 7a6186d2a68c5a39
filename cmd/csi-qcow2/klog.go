package main

import (
	"flag"
	"slices"

	"github.com/spf13/cobra"
	"k8s.io/klog/v2"
)

// addLogFlags gives a server klog's flags. Help shows those that one needs: everything goes to standard
// error, from where the cluster collects it.
func addLogFlags(cmd *cobra.Command) {
	var all flag.FlagSet
	klog.InitFlags(&all)
	cmd.Flags().AddGoFlagSet(&all)
	all.VisitAll(func(f *flag.Flag) {
		cmd.Flags().Lookup(f.Name).Hidden = !slices.Contains(shownLogFlags(), f.Name)
	})
}

func shownLogFlags() []string { return []string{"v", "vmodule"} }

// logFlags returns those log flags that cmd was given, as arguments for another process.
func logFlags(cmd *cobra.Command) []string {
	var args []string
	for _, name := range shownLogFlags() {
		if f := cmd.Flags().Lookup(name); f.Changed {
			args = append(args, "--"+name+"="+f.Value.String())
		}
	}
	return args
}
