package main

import (
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
)

// graph says for each file of a package which others it calls, and there what.
type graph map[string]map[string][]string

// call notes that a function of file from calls one, named fn, of file to.
func (g graph) call(from, to, fn string) {
	if from != to && !slices.Contains(g[from][to], fn) {
		g[from][to] = append(g[from][to], fn)
	}
}

// circles returns the strongly connected components of more than one file, the largest first (Tarjan's algorithm).
func (g graph) circles() [][]string {
	var (
		circles [][]string
		stack   []string
		index   = make(map[string]int) // in which order files were met, from 1
		low     = make(map[string]int) // the first file on the stack that can be reached
		visit   func(file string)
	)
	visit = func(file string) {
		index[file] = len(index) + 1
		low[file] = index[file]
		stack = append(stack, file)
		for _, to := range slices.Sorted(maps.Keys(g[file])) {
			if index[to] == 0 {
				visit(to)
				low[file] = min(low[file], low[to])
			} else if slices.Contains(stack, to) {
				low[file] = min(low[file], index[to])
			}
		}
		if low[file] != index[file] {
			return
		}
		at := slices.Index(stack, file)
		if c := slices.Sorted(slices.Values(stack[at:])); len(c) > 1 {
			circles = append(circles, c)
		}
		stack = stack[:at]
	}
	for _, file := range slices.Sorted(maps.Keys(g)) {
		if index[file] == 0 {
			visit(file)
		}
	}
	slices.SortStableFunc(circles, func(a, b []string) int { return cmp.Compare(len(b), len(a)) })
	return circles
}

func (g graph) describe(w io.Writer, circles [][]string) {
	for _, c := range circles {
		fmt.Fprintf(w, "  %s\n", strings.Join(c, " "))
		for _, from := range c {
			for _, to := range c {
				if fns := g[from][to]; len(fns) > 0 {
					fmt.Fprintf(w, "    %s → %s: %s\n", from, to, strings.Join(slices.Sorted(slices.Values(fns)), " "))
				}
			}
		}
	}
}
