package main

import (
	"errors"
	"fmt"
	"io"
	"regexp"

	"github.com/spf13/cobra"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// checkReport is the JSON of `image check`, with the keys of `qemu-img check --output=json`, and more: what is wrong,
// or was before a repair, and what the repair did.
type checkReport struct {
	Filename         string   `json:"filename"`
	Format           string   `json:"format"`
	Errors           int64    `json:"check-errors"`
	Corruptions      int64    `json:"corruptions,omitempty"`
	Leaks            int64    `json:"leaks,omitempty"`
	CorruptionsFixed int64    `json:"corruptions-fixed,omitempty"`
	LeaksFixed       int64    `json:"leaks-fixed,omitempty"`
	Total            int64    `json:"total-clusters"`
	Allocated        int64    `json:"allocated-clusters"`
	ImageEnd         int64    `json:"image-end-offset"`
	Problems         []string `json:"problems,omitempty"`
	Mended           []string `json:"mended,omitempty"`
	Lost             int64    `json:"lost,omitempty"`
}

// repairKind returns what a value of --repair means.
func repairKind(value string) (qcow2.RepairKind, error) {
	switch value {
	case "leaks":
		return qcow2.RepairLeaks, nil
	case "all":
		return qcow2.RepairAll, nil
	}
	return 0, fmt.Errorf("--repair %s: it is all or leaks", value)
}

const checkCommand = "check"

func newImageCheckCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   checkCommand + " FILE",
		Short: "Check the metadata of an image, and repair it",
		Long: `Check the metadata of an image: the reference count of each cluster, the flags that depend on it, that
nothing overlaps, the snapshot table.

With --repair leaks, clusters that nothing uses are given back. With --repair all, everything that contradicts
itself is mended as well: what can be read stays as it is, references that lead nowhere are given up and read
as zeros, snapshots without an L1 table are removed. Make a copy of a corrupt image first. A repair that is
interrupted has changed nothing, or all.

The exit status is that of ` + "`qemu-img check`" + `, after a repair that of another check: 0 the image is clean,
1 it could not be checked, 2 it is corrupt, 3 clusters are leaked (they cost space and do no harm).`,
		Args: takes("FILE"),
	}
	output := addOutputFlag(cmd)
	cmd.Flags().BoolP("quiet", "q", false, "say nothing; the exit status tells")
	repair := cmd.Flags().String("repair", "", "what to repair: `leaks` or all")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if !cmd.Flags().Changed("repair") {
			return checkImage(cmd, args[0], output)
		}
		kind, err := repairKind(*repair)
		if err != nil {
			return err
		}
		return repairImage(cmd, args[0], kind, output)
	}
	return cmd
}

func checkImage(cmd *cobra.Command, path string, output *outputFlag) error {
	var result qcow2.CheckResult
	err := withFile(path, true, func(f qcow2.File) (err error) {
		p := newProgress(cmd.ErrOrStderr(), "checking", path)
		defer p.end()
		result, err = qcow2.Check(cmd.Context(), f, p.update)
		return err
	})
	if err != nil {
		return err
	}
	return newCheckReport(path, result).print(cmd, output, result)
}

func repairImage(cmd *cobra.Command, path string, kind qcow2.RepairKind, output *outputFlag) error {
	var result qcow2.RepairResult
	err := withFile(path, false, func(f qcow2.File) (err error) {
		p := newProgress(cmd.ErrOrStderr(), "repairing", path)
		defer p.end()
		result, err = qcow2.Repair(cmd.Context(), f, kind, p.update)
		return err
	})
	if err != nil {
		return err
	}
	r := newCheckReport(path, result.Left)
	r.Problems, r.Mended, r.Lost = result.Found.Problems, result.Mended, result.Lost
	if result.FoundErr != nil {
		r.Problems = []string{result.FoundErr.Error()}
	}
	r.CorruptionsFixed = max(0, result.Found.Corruptions-result.Left.Corruptions)
	r.LeaksFixed = max(0, result.Found.Leaks-result.Left.Leaks)
	return r.print(cmd, output, result.Left)
}

// withFile opens the file of an image that may be too damaged to be opened as one.
func withFile(path string, readOnly bool, work func(qcow2.File) error) (err error) {
	f, err := qcow2.OpenFile(path, readOnly)
	if err != nil {
		return inUse(path, err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	return work(f)
}

func newCheckReport(path string, result qcow2.CheckResult) checkReport {
	return checkReport{
		Filename: path, Format: "qcow2",
		Errors: result.Errors, Corruptions: result.Corruptions, Leaks: result.Leaks, Problems: result.Problems,
		Total: result.Clusters, Allocated: result.Allocated, ImageEnd: result.ImageEnd,
	}
}

// print prints the report, and returns the exit status of its verdict.
func (r checkReport) print(cmd *cobra.Command, output *outputFlag, verdict qcow2.CheckResult) error {
	if quiet, err := cmd.Flags().GetBool("quiet"); err != nil || !quiet {
		if err := errors.Join(err, output.print(cmd.OutOrStdout(), r, r.table)); err != nil {
			return err
		}
	}
	if status := verdict.ExitStatus(); status != 0 {
		return statusError(status)
	}
	return nil
}

func (r checkReport) table(w io.Writer) {
	r.verdict(w)
	for _, line := range sumUp(r.Problems) {
		fmt.Fprintln(w, line)
	}
	if more := r.Corruptions + r.CorruptionsFixed + r.Leaks + r.LeaksFixed - int64(len(r.Problems)); more > 0 {
		fmt.Fprintf(w, "and %d more\n", more)
	}
	for _, line := range sumUp(r.Mended) {
		fmt.Fprintln(w, "repaired:", line)
	}
	if r.Lost > 0 {
		fmt.Fprintf(w, "%d references to content led nowhere and were given up.\n", r.Lost)
	}
	if r.Total > 0 {
		fmt.Fprintf(w, "%d of %d clusters are allocated (%.2f %%).\nThe image ends at offset %d.\n",
			r.Allocated, r.Total, 100*float64(r.Allocated)/float64(r.Total), r.ImageEnd)
	}
}

// verdict says in one line what the image is, after a repair if there was one.
func (r checkReport) verdict(w io.Writer) {
	switch {
	case r.Errors > 0:
		fmt.Fprintf(w, "Not all of the image could be checked. It is corrupt: %d errors, %d leaked clusters.\n", r.Corruptions, r.Leaks)
	case r.Corruptions > 0:
		fmt.Fprintf(w, "The image is corrupt: %d errors, %d leaked clusters.\n", r.Corruptions, r.Leaks)
	case r.Leaks > 0:
		fmt.Fprintf(w, "%d clusters are leaked: they cost space and do no harm.\n", r.Leaks)
	case r.CorruptionsFixed+r.LeaksFixed > 0:
		fmt.Fprintf(w, "The image is clean. Repaired: %d errors, %d leaked clusters.\n", r.CorruptionsFixed, r.LeaksFixed)
	default:
		fmt.Fprintln(w, "The image is clean.")
	}
}

// sumUp makes one line of each run of lines that differ only in their numbers: the first, and up to which there are others.
func sumUp(lines []string) []string {
	number := regexp.MustCompile(`0x[0-9a-f]+|\d+`)
	kind := func(line string) string { return number.ReplaceAllString(line, "0") }
	var out []string
	for i := 0; i < len(lines); {
		end := i + 1
		for end < len(lines) && kind(lines[end]) == kind(lines[i]) {
			end++
		}
		line := lines[i]
		if n := end - i - 1; n == 1 {
			line += "; and " + lines[end-1]
		} else if n > 1 { // all but the last
			line += fmt.Sprintf("; and %d more like it, up to: %s", n-1, lines[end-1])
		}
		out = append(out, escape(line))
		i = end
	}
	return out
}
