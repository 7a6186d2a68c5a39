package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const sample = `package sample

func (d *dir) replace() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.file.Sync(); err != nil {
		return err
	}
	if err := d.Rename(a, b); err != nil {
		return err
	}
	if d.frozen {
		return nil
	}
	d.barrier = true
	d.note("for people")
	d.touch(a)
	go func() { d.forget(b) }()
	return d.sync()
}
`

// TestFind checks what the rules make of a function, and that each mutant differs from the source in that only.
func TestFind(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "sample.go"), []byte(sample), 0o600); err != nil {
		t.Fatal(err)
	}
	all, err := find(dir)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string][2]string{ // what is there instead of what
		"without d.mu.Lock":                  {"d.mu.Lock()\n\tdefer d.mu.Unlock()", "{}\n\t{}"},
		"without d.file.Sync()":              {"d.file.Sync()", "error(nil)"},
		"d.file.Sync() after d.Rename(a, b)": {"", ""},
		"never if d.frozen":                  {"if d.frozen", "if false && (d.frozen)"},
		"without d.barrier = true":           {"d.barrier = true", "{}"},
		"without d.touch(a)":                 {"d.touch(a)", "{}"},
		"without d.forget(b)":                {"d.forget(b)", "{}"},
		"without d.sync()":                   {"d.sync()", "error(nil)"},
	}
	for _, m := range all {
		_, what, _ := strings.Cut(m.name, "sample.go:replace ")
		change, ok := want[what]
		if !ok {
			t.Errorf("a mutant that nobody wants: %s", m.name)
		}
		delete(want, what)
		got := string(m.source())
		if change[0] != "" && got != strings.Replace(sample, change[0], change[1], 1) {
			t.Errorf("%s:\n%s", m.name, got)
		}
		if change[0] == "" && strings.Index(got, "Rename") > strings.Index(got, "Sync") {
			t.Errorf("%s:\n%s", m.name, got)
		}
	}
	for what := range want {
		t.Errorf("no mutant %s", what)
	}
}

// TestTable checks that the table's names are read as they are written.
func TestTable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "table.md")
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.WriteFile(path, []byte("| survivor | reason |\n|---|---|\n| `a.go:f never if a \\| b` | it is only faster |\n"), 0o600))
	reasons, err := readTable(path)
	must(err)
	if len(reasons) != 1 || reasons["a.go:f never if a | b"] != "it is only faster" {
		t.Errorf("%q", reasons)
	}
	r, err := openResults(filepath.Join(t.TempDir(), "kept", "results.json"))
	must(err)
	m := mutant{name: "m", file: path}
	must(r.put(m, survived, true))
	again, err := openResults(r.path)
	must(err)
	if became, ok := again.get(m); !ok || became != survived {
		t.Errorf("%q, %v", became, ok)
	}
	must(os.WriteFile(path, []byte("changed"), 0o600))
	again, err = openResults(r.path)
	must(err)
	if became, ok := again.get(m); ok {
		t.Errorf("of a changed file it is known: %q", became)
	}
}

// TestExtra checks that each line of the list still is about the code.
func TestExtra(t *testing.T) {
	t.Chdir("../..")
	all, err := readExtra("hack/mutants/extra.txt", packages())
	if err != nil || len(all) == 0 {
		t.Fatalf("%d mutants, %v", len(all), err)
	}
}
