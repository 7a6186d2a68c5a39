package demo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// Names of the snapshots of the file system.
const (
	duringCopy = "during-the-copy"
	afterCopy  = "after-the-copy"
)

// fileSystem plays the life of a mounted file system.
func (p *play) fileSystem(ctx context.Context) {
	p.title("A file system")
	size := max(512<<20, (2*p.tree.length+256<<20)>>20<<20)
	p.files = p.create(ctx, fmt.Sprintf("create a volume of %d MiB", size>>20), p.world.newVolume("files", size, fileSystem("ext4")), "")
	p.mount(ctx, p.files, "stage, publish: attach, format (ext4), mount")
	during, cut := p.copyTree(ctx)
	p.after = p.snapshot(ctx, p.files, afterCopy)
	p.show(ctx, "csi-qcow2", "volume", "list")
	p.show(ctx, "csi-qcow2", "image", "snapshot", "list", p.files.shortImage())
	p.space()
	p.step("delete files, overwrite others", func() (string, error) { return p.damage(ctx) })

	p.restore(ctx, "files-restored", p.after, p.equal)
	p.restore(ctx, "files-half", during, cut.check)
	p.revert(ctx, p.files, afterCopy)
	p.compare(ctx, p.files, p.equal)
}

// copyTree copies the tree into the volume, and takes a snapshot when a third of it is there.
func (p *play) copyTree(ctx context.Context) (snapshot string, c cut) {
	if p.wait("copy the original, and take a snapshot meanwhile"); p.err != nil {
		return "", cut{}
	}
	pause := p.pause
	p.pause = nil // the copy does not wait
	defer func() { p.pause = pause }()
	ctx, cancel := context.WithCancel(ctx)
	copying := startCopy(ctx, p.source, p.files.path(), p.tree)
	defer func() { _ = copying.wait() }() // the step that waits for it reports the error
	defer cancel()
	total := int64(len(p.tree.paths))
	p.step("copy the original into it: the first third", func() (string, error) {
		return fmt.Sprintf("%d paths", total/3), copying.reach(ctx, total/3)
	})
	c = cut{tree: p.tree}
	p.step("take snapshot "+duringCopy+" while it runs", func() (_ string, err error) {
		c.least = copying.done.Load()
		snapshot, err = p.files.snapshot(ctx, duringCopy)
		c.most = copying.done.Load() + 1 // one may be under way
		if c.least == total {
			err = errors.New("the copy has ended; use a larger --source")
		}
		return fmt.Sprintf("begun after %d paths, answered after %d", c.least, c.most-1), err
	})
	p.step("let the copy end", func() (string, error) { return p.tree.String(), copying.wait() })
	return snapshot, c
}

// cut is what a snapshot taken during the copy holds: the first least paths, and none beyond the first most.
type cut struct {
	tree        tree
	least, most int64
}

func (c cut) check(got tree) (string, error) {
	for i, path := range c.tree.paths {
		want := c.tree.sums[path]
		sum, there := got.sums[path]
		switch {
		case int64(i) < c.least && sum != want:
			return "", fmt.Errorf("%s was complete when the snapshot was asked for: want %q, have %q", path, want, sum)
		case int64(i) >= c.most && there:
			return "", fmt.Errorf("%s was made after the snapshot was answered, and is in it", path)
		}
	}
	return fmt.Sprintf("%d paths, as it was then", len(got.paths)), nil
}

// equal compares a tree with the original.
func (p *play) equal(got tree) (string, error) {
	if n, example := differences(p.tree, got); n > 0 {
		return "", fmt.Errorf("%d paths differ, for example %s", n, example)
	}
	return got.String() + ", all equal", nil
}

// damage deletes each third file and overwrites the one after it.
func (p *play) damage(ctx context.Context) (string, error) {
	var deleted, overwritten int
	for i, path := range p.tree.paths {
		path = filepath.Join(p.files.path(), path)
		info, err := os.Lstat(path)
		if err = errors.Join(err, ctx.Err()); err != nil {
			return "", err
		}
		if !info.Mode().IsRegular() {
			continue
		}
		switch i % 3 {
		case 0:
			err, deleted = os.Remove(path), deleted+1
		case 1:
			err, overwritten = os.WriteFile(path, make([]byte, info.Size()+1), info.Mode()), overwritten+1
		}
		if err != nil {
			return "", err
		}
	}
	now, err := readTree(ctx, p.files.path())
	if err != nil {
		return "", err
	}
	if n, _ := differences(p.tree, now); n != deleted+overwritten {
		return "", fmt.Errorf("%d paths differ from the original; %d were deleted, %d overwritten", n, deleted, overwritten)
	}
	return fmt.Sprintf("%d deleted, %d overwritten", deleted, overwritten), nil
}

// restore makes a volume from a snapshot of files, mounts it and checks what is in it.
func (p *play) restore(ctx context.Context, name, snapshot string, check func(tree) (string, error)) {
	v := p.world.newVolume(name, p.files.size, fileSystem("ext4"))
	p.create(ctx, "restore the snapshot as "+name, v, snapshot)
	p.mount(ctx, v, "stage and publish it")
	p.compare(ctx, v, check)
}

func (p *play) compare(ctx context.Context, v *volume, check func(tree) (string, error)) {
	p.step("compare every file with the original", func() (string, error) {
		got, err := readTree(ctx, v.path())
		if err != nil {
			return "", err
		}
		return check(got)
	})
}

// sourceDeleted deletes the file system's volume and restores it from its snapshot, which outlives it.
func (p *play) sourceDeleted(ctx context.Context) {
	p.title("A snapshot outlives its volume")
	p.step("unpublish, unstage, delete the first volume", func() (string, error) {
		if err := p.files.unmount(ctx); err != nil {
			return "", err
		}
		return "its snapshots stay", p.files.delete(ctx)
	})
	p.inCluster("kubectl delete pvc files")
	p.show(ctx, "csi-qcow2", "volume", "list")
	p.space()
	p.restore(ctx, "files-again", p.after, p.equal)
}
