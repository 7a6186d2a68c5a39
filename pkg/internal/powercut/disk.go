package powercut

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Disk is a directory tree as the running system sees it, and what of it is durable.
type Disk struct {
	path    string
	root    *node
	changes []renaming // of names, in order, those that are not durable yet
	open    map[int64]*opened
}

// node is a directory or a file.
type node struct {
	dir            bool
	names, durable map[string]*node // of a directory

	now, synced content // of a file; what synced holds is never written to
	changes     []change
}

// renaming is an atomic change of names.
type renaming struct {
	moved []*node // whose names it changes
	sets  []entry
}

// entry is a name in a directory, and what it becomes the name of: nil for nothing.
type entry struct {
	dir  *node
	name string
	to   *node
}

// opened is an open file of the traced process.
type opened struct {
	*node
	at int64 // where write(2) writes
}

func newDir() *node { return &node{dir: true, names: map[string]*node{}, durable: map[string]*node{}} }

// Load returns a tree all of which is durable.
func Load(t *testing.T, path string) *Disk {
	t.Helper()
	d := &Disk{path: path, root: newDir()}
	nodes := map[string]*node{path: d.root}
	err := filepath.WalkDir(path, func(p string, e fs.DirEntry, err error) error {
		if err != nil || p == path {
			return err
		}
		n := newDir()
		if !e.IsDir() {
			if n, err = loadFile(p); err != nil {
				return err
			}
		}
		parent := nodes[filepath.Dir(p)]
		nodes[p], parent.names[e.Name()], parent.durable[e.Name()] = n, n, n
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func loadFile(path string) (*node, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return nil, err
	}
	c := content{data: data}
	if blocks := st.Blocks * 512; blocks >= st.Size {
		c.allocated = blocks
	}
	return &node{now: c, synced: c.clone()}, nil
}

// Clone returns a disk of the same state, for the calls of another process on a copy of the tree at path.
func (d *Disk) Clone(path string) *Disk {
	copies := map[*node]*node{nil: nil}
	var clone func(n *node) *node
	cloneNames := func(names map[string]*node) map[string]*node {
		all := map[string]*node{}
		for name, n := range names {
			all[name] = clone(n)
		}
		return all
	}
	clone = func(n *node) *node {
		if c, ok := copies[n]; ok {
			return c
		}
		c := &node{dir: n.dir, now: n.now.clone(), synced: n.synced, changes: slices.Clone(n.changes)}
		copies[n] = c
		if n.dir {
			c.names, c.durable = cloneNames(n.names), cloneNames(n.durable)
		}
		return c
	}
	other := &Disk{path: path, root: clone(d.root)}
	for _, r := range d.changes {
		c := renaming{}
		for _, n := range r.moved {
			c.moved = append(c.moved, clone(n))
		}
		for _, e := range r.sets {
			c.sets = append(c.sets, entry{clone(e.dir), e.name, clone(e.to)})
		}
		other.changes = append(other.changes, c)
	}
	return other
}

// rename makes an atomic change of names.
func (d *Disk) rename(sets ...entry) {
	r := renaming{sets: sets}
	for _, e := range sets {
		for _, n := range []*node{e.dir.names[e.name], e.to} {
			if n != nil && !slices.Contains(r.moved, n) {
				r.moved = append(r.moved, n)
			}
		}
	}
	for _, e := range sets {
		set(e.dir.names, e)
	}
	d.changes = append(d.changes, r)
	d.forgetUnreachable()
}

func set(names map[string]*node, e entry) {
	if e.to == nil {
		delete(names, e.name)
	} else {
		names[e.name] = e.to
	}
}

// change changes a file's content.
func (n *node) change(g change) {
	g.apply(&n.now)
	n.changes = append(n.changes, g)
}

// sync makes a file's content durable, or a directory's names.
func (d *Disk) sync(n *node) {
	if !n.dir {
		n.synced, n.changes = n.now.clone(), nil
		return
	}
	d.settle(func(r renaming) bool { return slices.ContainsFunc(r.sets, func(e entry) bool { return e.dir == n }) })
}

// syncAll makes everything durable.
func (d *Disk) syncAll() {
	d.settle(func(renaming) bool { return true })
	for n := range d.reachable() {
		if !n.dir {
			d.sync(n)
		}
	}
}

// settle makes changes of names durable, and those before them that they depend on.
func (d *Disk) settle(which func(renaming) bool) {
	chosen := make([]bool, len(d.changes))
	for i, r := range d.changes {
		chosen[i] = which(r)
	}
	d.complete(chosen, func(earlier, later renaming) bool { return earlier.movesOneOf(later) || earlier.setsOneOf(later) })
	var pending []renaming
	for i, r := range d.changes {
		if !chosen[i] {
			pending = append(pending, r)
			continue
		}
		for _, e := range r.sets {
			set(e.dir.durable, e)
		}
	}
	d.changes = pending
}

// complete chooses what comes before a chosen change and cannot be missing if that has happened.
func (d *Disk) complete(chosen []bool, needed func(earlier, later renaming) bool) {
	for i := len(chosen) - 1; i > 0; i-- {
		for j := range i {
			chosen[j] = chosen[j] || chosen[i] && needed(d.changes[j], d.changes[i])
		}
	}
}

// movesOneOf tells whether both move the same file: it is never in two places, nor back in an earlier one.
func (r renaming) movesOneOf(other renaming) bool {
	return slices.ContainsFunc(r.moved, func(n *node) bool { return slices.Contains(other.moved, n) })
}

// setsOneOf tells whether both change the same name.
func (r renaming) setsOneOf(other renaming) bool {
	return slices.ContainsFunc(r.sets, func(a entry) bool {
		return slices.ContainsFunc(other.sets, func(b entry) bool { return a.dir == b.dir && a.name == b.name })
	})
}

// reachable returns what a cut may leave in the tree, or the running system sees.
func (d *Disk) reachable() map[*node]bool {
	found := map[*node]bool{}
	var visit func(n *node)
	visit = func(n *node) {
		if n == nil || found[n] {
			return
		}
		found[n] = true
		for _, names := range []map[string]*node{n.names, n.durable} {
			for child := range maps.Values(names) {
				visit(child)
			}
		}
		for _, r := range d.changes {
			for _, e := range r.sets {
				if e.dir == n {
					visit(e.to)
				}
			}
		}
	}
	visit(d.root)
	return found
}

// forgetUnreachable forgets changes of which no cut can show anything: those in directories that are gone for good.
func (d *Disk) forgetUnreachable() {
	found := d.reachable()
	d.changes = slices.DeleteFunc(d.changes, func(r renaming) bool {
		return !slices.ContainsFunc(r.sets, func(e entry) bool { return found[e.dir] })
	})
}

// Write writes the tree as the running system sees it.
func (d *Disk) Write(path string) error {
	all := make([]bool, len(d.changes))
	for i := range all {
		all[i] = true
	}
	tr := d.tree(all)
	fates := make([][]fate, len(tr.files))
	for i, f := range tr.files {
		fates[i] = slices.Repeat([]fate{kept}, len(f.node.changes))
	}
	return tr.state(fates, nil).Write(path)
}

// child returns what the running system sees under a path of names.
func (n *node) child(path string) *node {
	for name := range strings.SplitSeq(path, "/") {
		if name == "" || name == "." {
			continue
		}
		if n == nil || !n.dir {
			return nil
		}
		n = n.names[name]
	}
	return n
}

// Verify returns an error unless the tree on the disk is what the running system should see: then the calls that were made
// were all of them, and understood.
func (d *Disk) Verify(t *testing.T) error {
	t.Helper()
	var failures []error
	var compare func(path string, a, b *node)
	compare = func(path string, a, b *node) {
		switch {
		case a == nil || b == nil || a.dir != b.dir:
			failures = append(failures, fmt.Errorf("%s: on the disk %v, replayed %v", path, a != nil, b != nil))
		case a.dir:
			for _, name := range slices.Sorted(maps.Keys(a.names)) {
				compare(path+"/"+name, a.names[name], b.names[name])
			}
			for _, name := range slices.Sorted(maps.Keys(b.names)) {
				if a.names[name] == nil {
					compare(path+"/"+name, nil, b.names[name])
				}
			}
		case !bytes.Equal(a.now.data, b.now.data):
			failures = append(failures, fmt.Errorf("%s: has not the content that was replayed", path))
		}
	}
	compare(d.path, Load(t, d.path).root, d.root)
	return errors.Join(failures...)
}
