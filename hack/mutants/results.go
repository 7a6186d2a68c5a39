package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
)

// What became of a mutant, besides "killed: by what".
const (
	survived = "survived"
	invalid  = "does not compile"
)

// results keeps what became of mutants. A result counts as long as the mutated file is what it was.
type results struct {
	path string

	mu    sync.Mutex        // guards all below
	kept  map[string]string // by key
	now   map[string]string // what this run has found
	files map[string]string // the sum of each file
}

func openResults(path string) (*results, error) {
	r := &results{path: path, kept: map[string]string{}, now: map[string]string{}, files: map[string]string{}}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &r.kept)
	}
	return r, err
}

// key names a mutant of a file as it is.
func (r *results) key(m mutant) string {
	sum, ok := r.files[m.file]
	if !ok {
		b, _ := os.ReadFile(m.file) // without it, nothing is known
		all := sha256.Sum256(b)
		sum = hex.EncodeToString(all[:8])
		r.files[m.file] = sum
	}
	return sum + " " + m.name
}

func (r *results) get(m mutant) (string, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	became, ok := r.now[r.key(m)]
	if !ok {
		became, ok = r.kept[r.key(m)]
	}
	return became, ok
}

// put notes what became of a mutant, for this run and, if it is to be kept, for later ones.
func (r *results) put(m mutant, became string, keep bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.now[r.key(m)] = became
	if !keep {
		return nil
	}
	r.kept[r.key(m)] = became
	b, err := json.MarshalIndent(r.kept, "", " ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(r.path), 0o750); err != nil {
		return err
	}
	if err := os.WriteFile(r.path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(r.path+".new", r.path)
}

// readTable returns the reasons for known survivors: rows "| `NAME` | REASON |" of a Markdown file.
func readTable(path string) (map[string]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	reasons := map[string]string{}
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		row, ok := strings.CutPrefix(lines.Text(), "| `")
		name, reason, ok2 := strings.Cut(row, "` | ")
		if ok && ok2 {
			// A bar within a cell is written \| in Markdown.
			reasons[strings.ReplaceAll(name, `\|`, "|")] = strings.TrimSuffix(reason, " |")
		}
	}
	return reasons, lines.Err()
}
