// Circles prints how the files of each package call each other: its circles, each a set of files of which every one calls every
// other, perhaps by way of a third. Who has to understand one file of a circle has to read them all. It fails if a package has a
// circle of more files than bounds.txt allows it.
//
// A call is any mention of a function or a method of a concrete type of the same package. Calls through interfaces and stored
// functions do not count: they are what such a circle is cut with.
package main

import (
	_ "embed"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
)

//go:embed bounds.txt
var bounds string

func main() {
	verbose := flag.Bool("v", false, "name the files of each circle, and the calls between them")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "Usage: go run ./hack/circles [-v] [PACKAGES], by default ./pkg/... ./cmd/...")
		flag.PrintDefaults()
	}
	flag.Parse()
	patterns := flag.Args()
	if len(patterns) == 0 {
		patterns = []string{"./pkg/...", "./cmd/..."}
	}
	if err := run(os.Stdout, patterns, bounds, *verbose); err != nil {
		fmt.Fprintln(os.Stderr, "circles:", err)
		os.Exit(1)
	}
}

// run prints the circles of the packages that patterns name, and fails where bounds do not allow them.
func run(w io.Writer, patterns []string, bounds string, verbose bool) error {
	allowed, err := parseBounds(bounds)
	if err != nil {
		return err
	}
	packages, err := load(patterns)
	if err != nil {
		return err
	}
	var over []string
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "package\tfiles\tcircles\tbound")
	for _, p := range packages {
		circles := p.graph.circles()
		largest := 1
		sizes := make([]string, len(circles))
		for i, c := range circles {
			largest, sizes[i] = max(largest, len(c)), strconv.Itoa(len(c))
		}
		bound := max(allowed[p.path], 1)
		fmt.Fprintf(t, "%s\t%d\t%s\t%d\n", p.path, len(p.graph), strings.Join(sizes, " "), bound)
		if largest > bound {
			over = append(over, fmt.Sprintf("%s has a circle of %d files, bounds.txt allows %d", p.path, largest, bound))
		}
		if verbose {
			p.graph.describe(t, circles)
		}
	}
	if err := t.Flush(); err != nil || len(over) == 0 {
		return err
	}
	return fmt.Errorf("%s; see them with go run ./hack/circles -v", strings.Join(over, "; "))
}

// parseBounds reads lines of a package and the files that its largest circle may have. Where there is none it may have no circle.
func parseBounds(text string) (map[string]int, error) {
	bounds := make(map[string]int)
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		var path string
		var n int
		if _, err := fmt.Sscanf(line, "%s %d", &path, &n); err != nil {
			return nil, fmt.Errorf("bounds.txt: %q: %w", line, err)
		}
		bounds[path] = n
	}
	return bounds, nil
}
