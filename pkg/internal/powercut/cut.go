package powercut

import (
	"errors"
	"hash/maphash"
	"iter"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// State is a tree that a cut may leave.
type State struct {
	Traits Traits
	dirs   []string // paths, each behind its parent
	files  []file
}

// Traits say what a cut has done to what was not durable.
type Traits struct {
	NameLost    bool // a change of names has not happened
	OutOfOrder  bool // nor an earlier one than one that has
	ContentLost bool // a change of a file's content has not happened
	LengthOnly  bool // a write has left zeros
	Torn        bool // a write has happened in part
}

type file struct {
	path string
	content
}

// tree is what the names are after a cut.
type tree struct {
	traits Traits
	dirs   []string
	files  []treeFile
}

type treeFile struct {
	path string
	node *node
}

// mostTrees bounds how many combinations of names are looked at.
const mostTrees = 256

// Cuts returns the states that a cut may leave now: all of them if there are not more than limit, else as many at random, the
// extremes among them. Some may be equal.
func (d *Disk) Cuts(rng *rand.Rand, limit int) iter.Seq[State] {
	return func(yield func(State) bool) {
		trees, total := d.trees(rng), 0
		for _, tr := range trees {
			total += tr.states(limit)
		}
		if total <= limit {
			for _, tr := range trees {
				if !tr.each(rng, yield) {
					return
				}
			}
			return
		}
		nothing, all := trees[0], trees[len(d.changes)]
		for n := range limit {
			tr, extreme := trees[rng.IntN(len(trees))], torn+1
			switch n {
			case 0: // names that are ahead of what they name
				tr, extreme = all, lost
			case 1:
				tr, extreme = all, lengthOnly
			case 2:
				tr, extreme = nothing, kept
			case 3:
				tr, extreme = nothing, lost
			}
			if !yield(tr.sample(rng, extreme)) {
				return
			}
		}
	}
}

// trees returns the combinations of names, or, if there are too many, some.
func (d *Disk) trees(rng *rand.Rand) []tree {
	var trees []tree
	seen := map[string]bool{}
	add := func(chosen []bool) {
		d.complete(chosen, renaming.movesOneOf)
		key := string(bits(chosen))
		if !seen[key] {
			seen[key] = true
			trees = append(trees, d.tree(chosen))
		}
	}
	n := len(d.changes)
	for done := 0; done <= n; done++ { // in their order; the first and the last of these are the extremes
		chosen := make([]bool, n)
		for i := range done {
			chosen[i] = true
		}
		add(chosen)
	}
	if n <= 10 {
		for set := range 1 << n {
			chosen := make([]bool, n)
			for i := range chosen {
				chosen[i] = set>>i&1 == 1
			}
			add(chosen)
		}
		return trees
	}
	for len(trees) < mostTrees/2 {
		chosen, share := make([]bool, n), rng.Float64()
		for i := range chosen {
			chosen[i] = rng.Float64() < share
		}
		add(chosen)
	}
	return trees
}

func bits(chosen []bool) []byte {
	b := make([]byte, len(chosen))
	for i, c := range chosen {
		if c {
			b[i] = 1
		}
	}
	return b
}

// tree returns the names after a cut that has left the chosen changes of them.
func (d *Disk) tree(chosen []bool) tree {
	tr := tree{traits: Traits{NameLost: slices.Contains(chosen, false)}}
	changed := map[*node]map[string]*node{}
	for i, r := range d.changes {
		if !chosen[i] {
			continue
		}
		tr.traits.OutOfOrder = tr.traits.OutOfOrder || slices.Contains(chosen[:i], false)
		for _, e := range r.sets {
			if changed[e.dir] == nil {
				changed[e.dir] = maps.Clone(e.dir.durable)
			}
			set(changed[e.dir], e)
		}
	}
	var walk func(path string, n *node)
	walk = func(path string, n *node) {
		names := n.durable
		if c := changed[n]; c != nil {
			names = c
		}
		for _, name := range slices.Sorted(maps.Keys(names)) {
			child, at := names[name], filepath.Join(path, name)
			if child.dir {
				tr.dirs = append(tr.dirs, at)
				walk(at, child)
			} else {
				tr.files = append(tr.files, treeFile{at, child})
			}
		}
	}
	walk("", d.root)
	return tr
}

// states counts the states of the contents, up to more than limit.
func (tr *tree) states(limit int) int {
	n := 1
	for _, f := range tr.files {
		for _, g := range f.node.changes {
			if n *= g.fates(); n > limit {
				return n
			}
		}
	}
	return n
}

// each yields every state of the contents.
func (tr *tree) each(rng *rand.Rand, yield func(State) bool) bool {
	fates := make([][]fate, len(tr.files))
	for i, f := range tr.files {
		fates[i] = make([]fate, len(f.node.changes))
	}
	for {
		if !yield(tr.state(fates, rng)) {
			return false
		}
		if !tr.next(fates) {
			return true
		}
	}
}

// next counts on, each digit in its own base. False after the last.
func (tr *tree) next(fates [][]fate) bool {
	for i, f := range tr.files {
		for j, g := range f.node.changes {
			if fates[i][j]++; int(fates[i][j]) < g.fates() {
				return true
			}
			fates[i][j] = lost
		}
	}
	return false
}

// sample returns the state in which all changes of contents have one fate, as far as they may have it, or one at random.
func (tr *tree) sample(rng *rand.Rand, extreme fate) State {
	fates := make([][]fate, len(tr.files))
	for i, f := range tr.files {
		share := rng.IntN(4)
		for _, g := range f.node.changes {
			what := fate(rng.IntN(g.fates()))
			switch {
			case extreme <= torn:
				what = min(extreme, fate(g.fates()-1))
			case share == 0: // most of it is there
				what = max(what, kept)
			}
			fates[i] = append(fates[i], what)
		}
	}
	return tr.state(fates, rng)
}

// state makes a state of the names and of what becomes of each file's changes.
func (tr *tree) state(fates [][]fate, rng *rand.Rand) State {
	s := State{Traits: tr.traits, dirs: tr.dirs}
	coin := func() bool { return rng.IntN(2) == 0 }
	for i, f := range tr.files {
		c := f.node.synced
		if len(f.node.changes) > 0 {
			c = c.clone()
		}
		for j, g := range f.node.changes {
			what := fates[i][j]
			g.suffer(&c, what, coin)
			s.Traits.ContentLost = s.Traits.ContentLost || what == lost
			s.Traits.LengthOnly = s.Traits.LengthOnly || what == lengthOnly
			s.Traits.Torn = s.Traits.Torn || what == torn
		}
		s.files = append(s.files, file{f.path, c})
	}
	return s
}

// Sum tells states apart, with one seed.
func (s State) Sum(seed maphash.Seed) uint64 {
	var h maphash.Hash
	h.SetSeed(seed)
	for _, dir := range s.dirs {
		_, _ = h.WriteString(dir + "/\x00")
	}
	for _, f := range s.files {
		_, _ = h.WriteString(f.path + "\x00")
		maphash.WriteComparable(&h, [2]int64{int64(len(f.data)), f.allocated})
		_, _ = h.Write(f.data)
	}
	return h.Sum64()
}

// Write writes the state as a new directory.
func (s State) Write(path string) error {
	if err := os.Mkdir(path, 0o700); err != nil {
		return err
	}
	for _, dir := range s.dirs {
		if err := os.Mkdir(filepath.Join(path, dir), 0o700); err != nil {
			return err
		}
	}
	for _, f := range s.files {
		if err := f.write(filepath.Join(path, f.path)); err != nil {
			return err
		}
	}
	return nil
}

func (f file) write(path string) (err error) {
	out, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if err := out.Truncate(int64(len(f.data))); err != nil {
		return err
	}
	const page = 4096
	for off := 0; off < len(f.data); off += page { // holes stay holes
		part := f.data[off:min(off+page, len(f.data))]
		if strings.Trim(string(part), "\x00") == "" {
			continue
		}
		if _, err := out.WriteAt(part, int64(off)); err != nil {
			return err
		}
	}
	if f.allocated > 0 {
		return unix.Fallocate(int(out.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, f.allocated)
	}
	return nil
}

// String lists the state.
func (s State) String() string {
	var b strings.Builder
	for _, dir := range s.dirs {
		b.WriteString("  " + dir + "/\n")
	}
	for _, f := range s.files {
		b.WriteString("  " + f.path + ": " + f.describe() + "\n")
	}
	return b.String()
}

func (f file) describe() string {
	const most = 400
	if len(f.data) <= most {
		return strings.ToValidUTF8(string(f.data), "?")
	}
	return "..."
}
