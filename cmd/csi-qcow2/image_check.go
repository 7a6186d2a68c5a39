package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// checkReport is the JSON of `image check`, with the keys of `qemu-img check --output=json`, and the problems.
type checkReport struct {
	Filename    string   `json:"filename"`
	Format      string   `json:"format"`
	Errors      int64    `json:"check-errors"`
	Corruptions int64    `json:"corruptions,omitempty"`
	Leaks       int64    `json:"leaks,omitempty"`
	Total       int64    `json:"total-clusters"`
	Allocated   int64    `json:"allocated-clusters"`
	ImageEnd    int64    `json:"image-end-offset"`
	Problems    []string `json:"problems,omitempty"`
}

func newImageCheckCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check FILE",
		Short: "Check the metadata of an image",
		Long: `Check the metadata of an image: the reference count of each cluster, the flags that depend on it, that
nothing overlaps, the snapshot table.

The exit status is that of ` + "`qemu-img check`" + `: 0 the image is clean, 1 it could not be checked, 2 it is corrupt,
3 clusters are leaked (they cost space and do no harm).`,
		Args: takes("FILE"),
	}
	output := addOutputFlag(cmd)
	repair := cmd.Flags().String("repair", "", "`leaks` or all (not implemented yet)")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch {
		case !cmd.Flags().Changed("repair"):
		case *repair != "leaks" && *repair != "all":
			return fmt.Errorf("--repair %s: it is leaks or all", *repair)
		default:
			return errors.New("--repair: this version does not repair images yet; `qemu-img check -r leaks FILE` or `-r all` does")
		}
		return checkImage(cmd, args[0], output)
	}
	return cmd
}

func checkImage(cmd *cobra.Command, path string, output *outputFlag) error {
	var result qcow2.CheckResult
	err := withImage(path, true, func(img *qcow2.Image) (err error) {
		p := newProgress(cmd.ErrOrStderr(), "checking "+path)
		defer p.end()
		result, err = img.Check(cmd.Context(), p.update)
		return err
	})
	if err != nil {
		return err
	}
	report := checkReport{
		Filename: path, Format: "qcow2",
		Corruptions: result.Corruptions, Leaks: result.Leaks, Problems: result.Problems,
		Total: result.Clusters, Allocated: result.Allocated, ImageEnd: result.ImageEnd,
	}
	if err := output.print(cmd.OutOrStdout(), report, report.table); err != nil {
		return err
	}
	if status := result.ExitStatus(); status != 0 {
		return statusError(status)
	}
	return nil
}

func (r checkReport) table(w io.Writer) {
	for _, problem := range r.Problems {
		fmt.Fprintln(w, problem)
	}
	if more := r.Corruptions + r.Leaks - int64(len(r.Problems)); more > 0 {
		fmt.Fprintf(w, "and %d more\n", more)
	}
	switch {
	case r.Corruptions > 0:
		fmt.Fprintf(w, "The image is corrupt: %d errors, %d leaked clusters.\n", r.Corruptions, r.Leaks)
	case r.Leaks > 0:
		fmt.Fprintf(w, "%d clusters are leaked: they cost space and do no harm.\n", r.Leaks)
	default:
		fmt.Fprintln(w, "The image is clean.")
	}
	if r.Total > 0 {
		fmt.Fprintf(w, "%d of %d clusters are allocated (%.2f %%); the image ends at offset %d.\n",
			r.Allocated, r.Total, 100*float64(r.Allocated)/float64(r.Total), r.ImageEnd)
	}
}
