// Mutants takes each sync, barrier, lock and order-relevant line out of the packages that keep data, one at a time, and tells
// which of these mutants no test of the package notices. A mutant is built with `go test -overlay`, so the tree stays as it is.
// What is known about a mutant is kept, so that a run that was ended goes on where it was.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"hash/fnv"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
)

// packages are those whose mutants are made, if none are named.
func packages() []string {
	return []string{
		"pkg/qcow2", "pkg/qcow2/internal/format", "pkg/qcow2/internal/fsck", "pkg/qcow2/internal/host",
		"pkg/pool", "pkg/blockdev", "pkg/engine", "pkg/engine/worker", "pkg/engine/helper",
	}
}

// options are what a run is told.
type options struct {
	list   bool
	again  bool   // survivors are tried again
	tests  string // regexp of the only tests to run
	quick  bool   // the slow tests are left out
	sample uint
	jobs   int
	match  *regexp.Regexp
	table  string
	kept   string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM) //nolint:forbidigo // this is main
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	var o options
	flag.BoolVar(&o.list, "list", false, "list the mutants, and try none")
	flag.BoolVar(&o.again, "again", false, "try survivors again, for tests that have changed")
	flag.BoolVar(&o.quick, "quick", false, "leave the slow tests out: what survives may be killed by them")
	flag.StringVar(&o.tests, "tests", "", "run only the tests that match this `regexp`: what survives may be killed by others")
	flag.UintVar(&o.sample, "sample", 1, "try one of so many mutants")
	flag.IntVar(&o.jobs, "jobs", 2, "try so many at once")
	match := flag.String("match", "", "try only mutants whose name matches this `regexp`")
	flag.StringVar(&o.table, "table", "docs/testing.md", "the survivors that are known, each with its reason")
	flag.StringVar(&o.kept, "results", ".cache/mutants.json", "what is known about mutants")
	flag.Parse()
	var err error
	if o.match, err = regexp.Compile(*match); err != nil {
		return err
	}
	dirs := flag.Args()
	if len(dirs) == 0 {
		dirs = packages()
	}
	all, err := findAll(dirs)
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(m mutant) bool { return !o.match.MatchString(m.name) || !sampled(m.name, o.sample) })
	if o.list {
		for _, m := range all {
			fmt.Printf("%s\t%s:%d\n", m.name, m.file, m.line)
		}
		fmt.Printf("%d mutants\n", len(all))
		return nil
	}
	explained, err := readTable(o.table)
	if err != nil {
		return err
	}
	known, err := openResults(o.kept)
	if err != nil {
		return err
	}
	if err := tryAll(ctx, all, known, &o); err != nil {
		return err
	}
	return report(os.Stdout, all, known, explained)
}

// partial tells that a mutant may survive though a test would have killed it.
func (o *options) partial() bool { return o.quick || o.tests != "" }

// findAll returns the mutants of the packages, by name.
func findAll(dirs []string) ([]mutant, error) {
	var all []mutant
	for _, dir := range dirs {
		ms, err := find(filepath.Clean(dir))
		if err != nil {
			return nil, err
		}
		all = append(all, ms...)
	}
	extra, err := readExtra("hack/mutants/extra.txt", dirs)
	if err != nil {
		return nil, err
	}
	all = append(all, extra...)
	slices.SortStableFunc(all, func(a, b mutant) int { return cmp.Compare(a.name, b.name) })
	return all, nil
}

// sampled tells whether a mutant belongs to a share: the same ones each time.
func sampled(name string, share uint) bool {
	h := fnv.New32a()
	_, _ = h.Write([]byte(name))
	return share <= 1 || uint(h.Sum32())%share == 0
}

// tryAll tries what is not known yet, some at once.
func tryAll(ctx context.Context, all []mutant, known *results, o *options) error {
	left := slices.DeleteFunc(slices.Clone(all), func(m mutant) bool {
		r, ok := known.get(m)
		return ok && (r != survived || !o.again)
	})
	fmt.Printf("%d mutants, %d to be tried\n", len(all), len(left))
	if len(left) == 0 {
		return nil
	}
	t, err := newTrier(ctx, left, o)
	if err != nil {
		return err
	}
	defer t.close()
	queue := make(chan mutant)
	var wait sync.WaitGroup
	for range max(1, o.jobs) {
		wait.Go(func() {
			for m := range queue {
				became, err := t.try(ctx, m)
				if ctx.Err() != nil {
					return
				}
				if err != nil {
					became = "no result: " + err.Error()
				} else if err := known.put(m, became, !o.partial() || became != survived); err != nil {
					became += " (not recorded: " + err.Error() + ")"
				}
				fmt.Printf("%s: %s\n", m.name, became)
			}
		})
	}
	for _, m := range left {
		select {
		case queue <- m:
			continue
		case <-ctx.Done():
		}
		break
	}
	close(queue)
	wait.Wait()
	return ctx.Err()
}

// report prints what became of the mutants, and fails if one survives that nobody has explained.
func report(w *os.File, all []mutant, known *results, explained map[string]string) error {
	count := map[string]int{}
	var unexplained []string
	for _, m := range all {
		became, ok := known.get(m)
		reason, told := explained[m.name]
		kind, _, _ := strings.Cut(became, ":")
		switch {
		case !ok:
			kind = "no result"
		case became == survived && !told:
			unexplained = append(unexplained, fmt.Sprint("| `", strings.ReplaceAll(m.name, "|", `\|`), "` | ", m.file, ":", m.line, " |"))
		case became == survived:
			fmt.Fprintf(w, "known survivor %s: %s\n", m.name, reason)
		case told:
			fmt.Fprintf(w, "no survivor any more, take it out of the table: %s\n", m.name)
		}
		count[kind]++
	}
	fmt.Fprintf(w, "\n%d mutants: %d killed, %d do not compile, %d survive (%d unexplained), %d without a result\n", len(all),
		count["killed"], count[invalid], count[survived], len(unexplained), count["no result"])
	if len(unexplained) == 0 {
		return nil
	}
	fmt.Fprintf(w, "\n| survives | where |\n|---|---|\n%s\n\n", strings.Join(unexplained, "\n"))
	return errors.New("no test notices these: make one, take the line out, or write the reason into the table")
}
