package main

import (
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"reflect"
	"strings"
	"testing"
)

// graphOf type-checks files and returns their graph.
func graphOf(t *testing.T, sources map[string]string) graph {
	t.Helper()
	fset := token.NewFileSet()
	var files []*ast.File
	for name, source := range sources {
		f, err := parser.ParseFile(fset, name, "package p\n"+source, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	g, err := callsBetween(fset, files, importer.Default())
	if err != nil {
		t.Fatal(err)
	}
	return g
}

func TestCircles(t *testing.T) {
	for name, c := range map[string]struct {
		sources map[string]string
		want    [][]string
	}{
		"calls one way": {
			sources: map[string]string{"a.go": "func a() { b() }", "b.go": "func b() {}"},
		},
		"within a file": {
			sources: map[string]string{"a.go": "func a() { b() }; func b() { a() }"},
		},
		"both ways": {
			sources: map[string]string{"a.go": "func a() { b() }", "b.go": "func b() { a() }"},
			want:    [][]string{{"a.go", "b.go"}},
		},
		"by way of a third, and one beside that is only called": {
			sources: map[string]string{
				"a.go": "func a() { b() }", "b.go": "func b() { c() }", "c.go": "func c() { a(); d() }", "d.go": "func d() {}",
			},
			want: [][]string{{"a.go", "b.go", "c.go"}},
		},
		"two, the larger first": {
			sources: map[string]string{
				"a.go": "func a() { b() }", "b.go": "func b() { a(); c() }",
				"c.go": "func c() { d() }", "d.go": "func d() { e() }", "e.go": "func e() { c() }",
			},
			want: [][]string{{"c.go", "d.go", "e.go"}, {"a.go", "b.go"}},
		},
		"methods, also of generic types and as values": {
			sources: map[string]string{
				"a.go": "type t[T any] struct{}; func (t[T]) f() { b() }", "b.go": "func b() { go func(func()) {}(t[int]{}.f) }",
			},
			want: [][]string{{"a.go", "b.go"}},
		},
		"an interface and a stored function cut": {
			sources: map[string]string{
				"a.go": "type i interface{ m() }; var f func(); func a(x i) { x.m(); f() }",
				"b.go": "type t struct{}; func (t) m() { a(t{}) }",
			},
		},
		"types, variables and constants are no calls": {
			sources: map[string]string{"a.go": "type t struct{ n int }; func a() { b() }", "b.go": "func b() { _ = t{n: 1}.n }"},
		},
	} {
		if got := graphOf(t, c.sources).circles(); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%s: %v, not %v", name, got, c.want)
		}
	}
}

// TestBound checks a package that has a circle: this one has none.
func TestBound(t *testing.T) {
	var out strings.Builder
	if err := run(&out, []string{"."}, "", false); err != nil {
		t.Errorf("no circle where none is allowed: %v", err)
	}
	const planted = "./testdata/circle"
	if err := run(&out, []string{planted}, "hack/circles/testdata/circle 2\n", false); err != nil {
		t.Errorf("a circle of 2 files where 2 are allowed: %v", err)
	}
	for _, bounds := range []string{"hack/circles/testdata/circle 1\n", ""} {
		if err := run(&out, []string{planted}, bounds, false); err == nil || !strings.Contains(err.Error(), "circle of 2 files") {
			t.Errorf("a circle of 2 files with bounds %q: %v", bounds, err)
		}
	}
	if err := run(&out, []string{"."}, "hack/circles many\n", false); err == nil {
		t.Error("a bound that is no number is taken")
	}
}
