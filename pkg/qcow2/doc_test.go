package qcow2

import (
	"go/ast"
	"go/doc"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

// TestAliasesAreDocumented: of a type that is an alias, go doc shows nothing but its docstring, which therefore lists all.
func TestAliasesAreDocumented(t *testing.T) {
	docs := typeDocs(t)
	for name, typ := range map[string]reflect.Type{
		"CheckResult": reflect.TypeFor[CheckResult](), "RepairResult": reflect.TypeFor[RepairResult](), "File": reflect.TypeFor[File](),
		"Allocator": reflect.TypeFor[Allocator](), "RangeCloner": reflect.TypeFor[RangeCloner](),
	} {
		members := typ.NumMethod()
		for i := range typ.NumMethod() {
			if m := typ.Method(i).Name + "("; !strings.Contains(docs[name], m) {
				t.Errorf("%s: %s) is not documented", name, m)
			}
		}
		if typ.Kind() == reflect.Struct {
			members += typ.NumField()
			for _, f := range reflect.VisibleFields(typ) {
				if !strings.Contains(docs[name], "\t"+f.Name+" ") {
					t.Errorf("%s: %s is not documented", name, f.Name)
				}
			}
		}
		if members == 0 {
			t.Errorf("%s has nothing", name)
		}
	}
}

// typeDocs returns the docstrings of the package's types.
func typeDocs(t *testing.T) map[string]string {
	t.Helper()
	paths, err := filepath.Glob("*.go")
	must(t, err)
	files, set := []*ast.File{}, token.NewFileSet()
	for _, path := range paths {
		if strings.HasSuffix(path, "_test.go") {
			continue
		}
		src, err := os.ReadFile(path)
		must(t, err)
		f, err := parser.ParseFile(set, path, src, parser.ParseComments)
		must(t, err)
		files = append(files, f)
	}
	p, err := doc.NewFromFiles(set, files, "qcow2")
	must(t, err)
	docs := map[string]string{}
	for _, typ := range p.Types {
		docs[typ.Name] = typ.Doc
	}
	return docs
}
