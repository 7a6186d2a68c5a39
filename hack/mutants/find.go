package main

import (
	"bufio"
	"bytes"
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// edit replaces a part of a file.
type edit struct {
	from, to int // to is behind its last byte
	text     string
}

// mutant is a file with a line, or a pair of them, taken out.
type mutant struct {
	name  string // of package, file, function and what is taken out; stays when lines move
	dir   string // of the package whose tests may notice it
	file  string // from the repository's root
	line  int
	lock  bool // what is taken out is a lock: only the race detector may see that
	edits []edit
	src   []byte // the file as it was found
}

// source returns the mutated file.
func (m *mutant) source() []byte {
	src := m.src
	edits := slices.SortedFunc(slices.Values(m.edits), func(a, b edit) int { return cmp.Compare(b.from, a.from) })
	for _, e := range edits {
		src = slices.Concat(src[:e.from], []byte(e.text), src[e.to:])
	}
	return src
}

// find returns the mutants that the rules make of a package.
func find(dir string) ([]mutant, error) {
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil || len(files) == 0 {
		return nil, fmt.Errorf("%s: no Go files: %w", dir, cmp.Or(err, os.ErrNotExist))
	}
	var all []mutant
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		src, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		f := &finder{rules: newRules(), dir: testsOf(dir), file: file, src: src, fset: token.NewFileSet(), times: map[string]int{}}
		tree, err := parser.ParseFile(f.fset, file, src, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		for _, d := range tree.Decls {
			if fn, ok := d.(*ast.FuncDecl); ok && fn.Body != nil {
				f.function(fn)
			}
		}
		all = append(all, f.all...)
	}
	return all, nil
}

// testsOf returns the package whose tests try the mutants of a package: a room inside another is tried by that one's,
// and what runs in the engine's processes by the engine's.
func testsOf(dir string) string {
	if strings.HasPrefix(dir, "pkg/engine/") {
		return "pkg/engine"
	}
	dir, _, _ = strings.Cut(dir, "/internal/")
	return dir
}

// finder makes the mutants of one file.
type finder struct {
	rules
	dir, file string
	src       []byte
	fset      *token.FileSet
	fn        string // the function that it is in
	times     map[string]int
	left      *ast.CallExpr // a statement of its own, which call has looked at
	all       []mutant
}

func (f *finder) at(p token.Pos) int             { return f.fset.Position(p).Offset }
func (f *finder) text(n ast.Node) string         { return string(f.src[f.at(n.Pos()):f.at(n.End())]) }
func (f *finder) over(n ast.Node, s string) edit { return edit{f.at(n.Pos()), f.at(n.End()), s} }

// maxName is how much of what is taken out is in a mutant's name, in bytes.
const maxName = 100

// add notes a mutant of a kind, at a node.
func (f *finder) add(what string, n ast.Node, lock bool, edits ...edit) {
	what = strings.Join(strings.Fields(what), " ")
	if len(what) > maxName {
		what = what[:maxName] + "…"
	}
	name := fmt.Sprintf("%s:%s %s", f.file, f.fn, what)
	f.times[name]++
	if k := f.times[name]; k > 1 {
		name = fmt.Sprintf("%s #%d", name, k)
	}
	f.all = append(f.all, mutant{
		name: name, dir: f.dir, file: f.file, line: f.fset.Position(n.Pos()).Line, lock: lock, edits: edits, src: f.src,
	})
}

func (f *finder) function(fn *ast.FuncDecl) {
	f.fn = fn.Name.Name
	f.locks(fn.Body)
	ast.Inspect(fn.Body, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncLit:
			f.locks(n.Body)
		case *ast.BlockStmt:
			f.swaps(n.List)
		case *ast.CaseClause:
			f.swaps(n.Body)
		case *ast.ExprStmt:
			f.call(n)
		case *ast.CallExpr:
			if n != f.left && f.syncs.MatchString(callee(n)) {
				f.add("without "+f.text(n), n, false, f.over(n, "error(nil)"))
			}
		case *ast.AssignStmt:
			f.mark(n)
		case *ast.IfStmt:
			f.guard(n)
		case *ast.BinaryExpr:
			if flag := f.text(n.Y); (n.Op == token.AND_NOT || n.Op == token.OR) && strings.HasPrefix(strings.TrimPrefix(flag, "format."), "FlagCopied") {
				f.add("without "+n.Op.String()+" "+flag, n, false, f.over(n, f.text(n.X)))
			}
		}
		return true
	})
}

// callee returns the name of what is called.
func callee(c *ast.CallExpr) string {
	switch fun := c.Fun.(type) {
	case *ast.Ident:
		return fun.Name
	case *ast.SelectorExpr:
		return fun.Sel.Name
	}
	return ""
}

// call takes out a statement that is a call.
func (f *finder) call(s *ast.ExprStmt) {
	c, ok := s.X.(*ast.CallExpr)
	if !ok {
		return
	}
	f.left = c
	if len(c.Args) > 0 {
		if l, ok := c.Args[0].(*ast.BasicLit); ok && l.Kind == token.STRING {
			return // something for people
		}
	}
	if name := callee(c); f.syncs.MatchString(name) || f.notes.MatchString(name) {
		f.add("without "+f.text(c), s, false, f.over(s, "{}"))
	}
}

// mark takes out an assignment to a mark, unless it only takes the mark away.
func (f *finder) mark(s *ast.AssignStmt) {
	if s.Tok == token.DEFINE || len(s.Lhs) != 1 || len(s.Rhs) != 1 {
		return
	}
	name := ""
	switch l := s.Lhs[0].(type) {
	case *ast.SelectorExpr:
		name = l.Sel.Name
	case *ast.IndexExpr:
		if sel, ok := l.X.(*ast.SelectorExpr); ok {
			name = sel.Sel.Name
		}
	}
	if value := f.text(s.Rhs[0]); f.marks.MatchString(name) && value != "false" {
		f.add("without "+f.text(s), s, false, f.over(s, "{}"))
	}
}

// guard makes a condition false that leaves something alone.
func (f *finder) guard(s *ast.IfStmt) {
	if s.Else != nil || len(s.Body.List) != 1 || !f.guards.MatchString(f.text(s.Cond)) {
		return
	}
	f.add("never if "+f.text(s.Cond), s, false, f.over(s.Cond, "false && ("+f.text(s.Cond)+")"))
}

// lockPair is what a function does to a lock.
type lockPair struct {
	first           ast.Node
	taken, returned int
	edits           []edit
}

// locks takes out both ends of each lock that a function takes and gives back.
func (f *finder) locks(body *ast.BlockStmt) {
	pairs := map[string]*lockPair{}
	var order []string
	note := func(s ast.Stmt, c *ast.CallExpr) {
		sel, ok := c.Fun.(*ast.SelectorExpr)
		if !ok {
			return
		}
		kind, returned := strings.Replace(sel.Sel.Name, "Unlock", "Lock", 1), strings.HasSuffix(sel.Sel.Name, "Unlock")
		if kind != "Lock" && kind != "RLock" {
			return
		}
		key := f.text(sel.X) + "." + kind
		p := pairs[key]
		if p == nil {
			p = &lockPair{first: s}
			pairs[key] = p
			order = append(order, key)
		}
		if returned {
			p.returned++
		} else {
			p.taken++
		}
		p.edits = append(p.edits, f.over(s, "{}"))
	}
	ast.Inspect(body, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncLit:
			return false
		case *ast.DeferStmt:
			note(n, n.Call)
		case *ast.ExprStmt:
			if c, ok := n.X.(*ast.CallExpr); ok {
				note(n, c)
			}
		}
		return true
	})
	for _, key := range order {
		if p := pairs[key]; p.taken > 0 && p.returned > 0 {
			f.add("without "+key, p.first, true, p.edits...)
		}
	}
}

// swaps lets neighbours change places that are calls with an order.
func (f *finder) swaps(list []ast.Stmt) {
	for i := 1; i < len(list); i++ {
		a, b := f.orderedCall(list[i-1]), f.orderedCall(list[i])
		if a == nil || b == nil || f.text(a) == f.text(b) {
			continue
		}
		f.add(fmt.Sprintf("%s after %s", f.text(a), f.text(b)), list[i-1], false,
			f.over(list[i-1], f.text(list[i])), f.over(list[i], f.text(list[i-1])))
	}
}

// orderedCall returns the call that a statement consists of, if its order matters.
func (f *finder) orderedCall(s ast.Stmt) *ast.CallExpr {
	var e ast.Expr
	switch s := s.(type) {
	case *ast.ExprStmt:
		e = s.X
	case *ast.IfStmt:
		if a, ok := s.Init.(*ast.AssignStmt); ok && len(a.Rhs) == 1 {
			e = a.Rhs[0]
		}
	case *ast.AssignStmt:
		if s.Tok == token.ASSIGN && len(s.Rhs) == 1 {
			e = s.Rhs[0]
		}
	}
	if c, ok := e.(*ast.CallExpr); ok && f.ordered.MatchString(callee(c)) {
		return c
	}
	return nil
}

// readExtra returns the mutants of the packages that are named one by one: lines of
//
//	FILE: OLD → NEW
//
// where OLD is in the file once. Other lines are comments, the first letter of which is a #.
func readExtra(path string, dirs []string) ([]mutant, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var all []mutant
	lines := bufio.NewScanner(f)
	for number := 1; lines.Scan(); number++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || line[0] == '#' {
			continue
		}
		file, change, ok := strings.Cut(line, ": ")
		before, after, ok2 := strings.Cut(change, "→")
		if before = strings.TrimSpace(before); !ok || !ok2 || before == "" {
			return nil, fmt.Errorf("%s:%d: it is not FILE: OLD → NEW", path, number)
		}
		if !slices.Contains(dirs, filepath.Dir(file)) {
			continue
		}
		src, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		if n := bytes.Count(src, []byte(before)); n != 1 {
			return nil, fmt.Errorf("%s:%d: %q is %d times in %s, not once", path, number, before, n, file)
		}
		at := bytes.Index(src, []byte(before))
		all = append(all, mutant{
			name: line, dir: testsOf(filepath.Dir(file)), file: file, line: 1 + bytes.Count(src[:at], []byte("\n")),
			edits: []edit{{at, at + len(before), strings.TrimSpace(after)}}, src: src,
		})
	}
	return all, lines.Err()
}
