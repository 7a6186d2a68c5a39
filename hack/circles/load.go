package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/importer"
	"go/parser"
	"go/token"
	"go/types"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// calls is what a package's files call of each other.
type calls struct {
	path  string // within the module
	graph graph
}

// listed is what the go command says about a package.
type listed struct {
	ImportPath, Dir, Export string
	GoFiles                 []string
	DepOnly                 bool
	Module                  *struct{ Path string }
}

// load compiles what patterns name, for what it imports, and looks through its files; tests are left out.
func load(patterns []string) ([]calls, error) {
	args := []string{"list", "-export", "-deps", "-json=ImportPath,Dir,Export,GoFiles,DepOnly,Module", "--"}
	cmd := exec.Command("go", append(args, patterns...)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w", err)
	}
	exports := make(map[string]string)
	var targets []listed
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var l listed
		if err := d.Decode(&l); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return nil, err
		}
		exports[l.ImportPath] = l.Export
		if !l.DepOnly {
			targets = append(targets, l)
		}
	}
	slices.SortFunc(targets, func(a, b listed) int { return strings.Compare(a.ImportPath, b.ImportPath) })
	fset := token.NewFileSet()
	imports := importer.ForCompiler(fset, "gc", func(path string) (io.ReadCloser, error) { return os.Open(exports[path]) })
	var all []calls
	for _, l := range targets {
		g, err := l.look(fset, imports)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", l.ImportPath, err)
		}
		all = append(all, calls{strings.TrimPrefix(l.ImportPath, l.Module.Path+"/"), g})
	}
	return all, nil
}

func (l listed) look(fset *token.FileSet, imports types.Importer) (graph, error) {
	var files []*ast.File
	for _, name := range l.GoFiles {
		f, err := parser.ParseFile(fset, filepath.Join(l.Dir, name), nil, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		files = append(files, f)
	}
	return callsBetween(fset, files, imports)
}

// callsBetween returns the calls between the files of a package.
func callsBetween(fset *token.FileSet, files []*ast.File, imports types.Importer) (graph, error) {
	info := types.Info{Uses: make(map[*ast.Ident]types.Object)}
	pkg, err := (&types.Config{Importer: imports}).Check("", fset, files, &info)
	if err != nil {
		return nil, err
	}
	file := func(p token.Pos) string { return filepath.Base(fset.Position(p).Filename) }
	g := make(graph)
	for _, f := range files {
		g[file(f.Package)] = make(map[string][]string)
	}
	for at, used := range info.Uses {
		if fn, ok := used.(*types.Func); ok && fn.Pkg() == pkg && !throughInterface(fn) {
			g.call(file(at.Pos()), file(fn.Origin().Pos()), fn.Name())
		}
	}
	return g, nil
}

func throughInterface(fn *types.Func) bool {
	recv := fn.Signature().Recv()
	return recv != nil && types.IsInterface(recv.Type())
}
