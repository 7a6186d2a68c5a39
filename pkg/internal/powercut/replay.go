package powercut

import (
	"slices"
	"strings"
	"testing"
)

// passive are calls that change nothing that a Disk has: it has neither times nor extended attributes, so that an image's
// mark of soundness, which fits one inode only, is always lost.
const passive = " flock fcntl fstatfs statfs sync_file_range fadvise64 faccessat2 readlink execve getcwd fchdir chdir" +
	" utimensat fgetxattr fsetxattr fremovexattr "

// Do makes a call of the traced process. It tells whether that has changed anything. A call that concerns the tree and is
// not known fails the test.
func (d *Disk) Do(t *testing.T, c Call) (changed bool) {
	t.Helper()
	if d.open == nil {
		d.open = map[int64]*opened{}
	}
	switch c.name {
	case "openat":
		return d.openAt(t, c)
	case "close":
		delete(d.open, c.number(t, 0))
		return false
	case "dup", "dup3", "fcntl":
		if o := d.file(t, c, 0); o != nil && (c.name != "fcntl" || strings.HasPrefix(c.args[1], "F_DUPFD")) {
			d.open[c.result] = o
		}
		return false
	case "mkdirat", "unlinkat", "renameat", "renameat2":
		return d.doNames(t, c)
	case "sync", "io_uring_setup", "copy_file_range", "sendfile", "splice":
		t.Fatalf("%s: not known here", c)
	}
	o := d.file(t, c, 0)
	if c.name == "mmap" {
		if o = d.file(t, c, 4); o != nil && strings.Contains(c.args[3], "MAP_SHARED") && strings.Contains(c.args[2], "PROT_WRITE") {
			t.Fatalf("%s: not known here", c)
		}
		return false
	}
	if o != nil {
		return d.doFile(t, o, c)
	}
	mentioned := func(s string) bool { return s == d.path || strings.HasPrefix(s, d.path+"/") }
	if slices.ContainsFunc(c.strings, mentioned) && c.Note == "" && !strings.Contains(passive, " "+c.name+" ") {
		t.Fatalf("%s: not known here", c)
	}
	return false
}

// file returns an open file that an argument is the descriptor of, or nil.
func (d *Disk) file(t *testing.T, c Call, i int) *opened {
	t.Helper()
	if i >= len(c.args) || c.args[i] == "" || c.args[i][0] < '0' || c.args[i][0] > '9' || strings.HasPrefix(c.args[i], "0x") {
		return nil
	}
	return d.open[c.number(t, i)]
}

// at finds the directory, and the name in it, that a call has in two arguments. nil for what is elsewhere.
func (d *Disk) at(t *testing.T, c Call, i int, path string) (dir *node, name string) {
	t.Helper()
	if strings.HasPrefix(path, "/") {
		rest, ok := strings.CutPrefix(path+"/", d.path+"/")
		if !ok {
			return nil, ""
		}
		dir, path = d.root, rest
	} else if o := d.file(t, c, i); o != nil {
		dir = o.node
	} else {
		return nil, ""
	}
	path = strings.TrimRight(path, "/")
	if slash := strings.LastIndexByte(path, '/'); slash >= 0 {
		dir, path = dir.child(path[:slash]), path[slash+1:]
	}
	if dir == nil || path == ".." {
		t.Fatalf("%s: not in the tree", c)
	}
	return dir, path
}

func (d *Disk) openAt(t *testing.T, c Call) (changed bool) {
	t.Helper()
	delete(d.open, c.result)
	dir, name := d.at(t, c, 0, c.strings[0])
	if dir == nil {
		return false
	}
	for _, flag := range []string{"O_TMPFILE", "O_SYNC", "O_DSYNC", "O_APPEND"} {
		if strings.Contains(c.args[2], flag) {
			t.Fatalf("%s: not known here", c)
		}
	}
	n := dir.child(name)
	if n == nil {
		n, changed = &node{}, true
		d.rename(entry{dir, name, n})
	}
	if strings.Contains(c.args[2], "O_TRUNC") && len(n.now.data) > 0 {
		n.change(change{kind: truncate})
		changed = true
	}
	d.open[c.result] = &opened{node: n}
	return changed
}

// doNames makes a call that changes names.
func (d *Disk) doNames(t *testing.T, c Call) (changed bool) {
	t.Helper()
	from, name := d.at(t, c, 0, c.strings[0])
	if len(c.strings) == 1 {
		if from == nil {
			return false
		}
		e := entry{dir: from, name: name}
		if c.name == "mkdirat" {
			e.to = newDir()
		}
		d.rename(e)
		return true
	}
	to, toName := d.at(t, c, 2, c.strings[1])
	switch {
	case from == nil && to == nil:
		return false
	case from == nil || to == nil:
		t.Fatalf("%s: out of the tree, or into it", c)
	}
	a, b := entry{dir: from, name: name}, entry{to, toName, from.names[name]}
	if strings.Contains(c.args[len(c.args)-1], "RENAME_EXCHANGE") {
		a.to = to.names[toName]
	}
	d.rename(a, b)
	return true
}

// doFile makes a call on an open file.
func (d *Disk) doFile(t *testing.T, o *opened, c Call) (changed bool) {
	t.Helper()
	last := len(c.args) - 1
	switch c.name {
	case "pwrite64", "pwritev", "write":
		data := strings.Join(c.strings, "")
		if int64(len(data)) < c.result {
			t.Fatalf("%s: %d bytes written, %d seen", c, c.result, len(data))
		}
		off := o.at
		if c.name == "write" {
			o.at += c.result
		} else {
			off = c.number(t, last)
		}
		o.change(change{kind: write, off: off, data: []byte(data[:c.result])})
	case "lseek":
		o.at = c.result
		return false
	case "ftruncate":
		size := c.number(t, 1)
		if size == int64(len(o.now.data)) && o.now.allocated <= size {
			return false
		}
		o.change(change{kind: truncate, off: size})
	case "fallocate":
		d.allocate(t, o.node, c)
	case "ioctl":
		return d.ioctl(t, o.node, c)
	case "fsync", "fdatasync":
		d.sync(o.node)
	case "syncfs":
		d.syncAll()
	default:
		if !strings.Contains(passive, " "+c.name+" ") {
			t.Fatalf("%s: not known here", c)
		}
		return false
	}
	return true
}

func (d *Disk) allocate(t *testing.T, n *node, c Call) {
	t.Helper()
	off, length := c.number(t, 2), c.number(t, 3)
	switch mode := c.args[1]; {
	case strings.Contains(mode, "PUNCH_HOLE"), strings.Contains(mode, "ZERO_RANGE") && strings.Contains(mode, "KEEP_SIZE"):
		n.change(change{kind: zero, off: off, n: length})
	case mode == "FALLOC_FL_KEEP_SIZE":
		n.change(change{kind: allocate, off: off + length})
	case mode == "0":
		n.change(change{kind: allocate, off: off + length})
		if off+length > int64(len(n.now.data)) {
			n.change(change{kind: truncate, off: off + length})
		}
	default:
		t.Fatalf("%s: not known here", c)
	}
}

// ioctl makes a file share blocks with another, which is as if they were written, or changes nothing.
func (d *Disk) ioctl(t *testing.T, n *node, c Call) (changed bool) {
	t.Helper()
	switch request := c.args[1]; {
	case strings.Contains(request, "FICLONERANGE"):
	case strings.Contains(request, "IOC_GETFLAGS"), strings.Contains(request, "IOC_SETFLAGS"), strings.Contains(request, "FIEMAP"):
		return false
	default:
		t.Fatalf("%s: not known here", c)
	}
	source := d.open[c.number(t, 2)]
	if source == nil {
		t.Fatalf("%s: from outside", c)
	}
	from, length := c.number(t, 3), c.number(t, 4)
	to := min(from+length, int64(len(source.now.data)))
	n.change(change{kind: write, off: c.number(t, 5), data: slices.Clone(source.now.data[from:to])})
	return true
}
