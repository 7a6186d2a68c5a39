// Package demo plays the whole life of two volumes, a mounted file system and a raw block device, against a
// real engine and a real CSI plugin on a temporary pool, and checks every byte on the way.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// Options of a demonstration.
type Options struct {
	Program string // this program's executable: it is started as engine, as plugin, and as image tool
	Version string
	Dir     string // where the temporary directory is made, on a disk
	Source  string // the directory whose tree is copied into the volume
	Out     io.Writer
}

// cleanupTime is what taking everything down may take, also after ctx has ended.
const cleanupTime = time.Minute

// Run plays the demonstration. It leaves nothing behind, also when a step fails or ctx ends.
func Run(ctx context.Context, o Options) (err error) {
	start := time.Now()
	w, err := newWorld(o)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			fmt.Fprintf(o.Out, "\nTaking everything down.\n")
		}
		down, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
		defer cancel()
		err = errors.Join(err, w.close(down))
		if err == nil {
			fmt.Fprintf(o.Out, "\nDone in %.0f s. No mount, device, process or file is left.\n", time.Since(start).Seconds())
		}
	}()
	fmt.Fprintf(o.Out, "csi-qcow2 %s: the life of two volumes, over the CSI socket, in %s\n", o.Version, w.dir)
	p := &play{report: &report{w: o.Out}, world: w, source: o.Source}
	p.start(ctx)
	p.fileSystem(ctx)
	p.blockDevice(ctx)
	p.expand(ctx)
	p.sourceDeleted(ctx)
	p.unmountAll(ctx)
	p.outsider(ctx)
	p.cleanUp(ctx)
	if p.err != nil && ctx.Err() == nil {
		fmt.Fprint(o.Out, w.logs())
	}
	return p.err
}

// play is what the acts share.
type play struct {
	*report
	world  *world
	source string // directory
	tree   tree   // its content
	files  *volume
	block  *volume
	after  string // ID of the snapshot of files that holds all of the tree
}

func (p *play) start(ctx context.Context) {
	p.title("Start")
	p.step("make a pool, start engine and CSI plugin on it", func() (string, error) {
		return "", p.world.start(ctx)
	})
	p.step("read the original, "+p.source, func() (_ string, err error) {
		p.tree, err = readTree(ctx, p.source)
		return p.tree.String(), err
	})
}

// create returns a new volume, empty or from a snapshot.
func (p *play) create(ctx context.Context, what string, v *volume, snapshot string) *volume {
	p.step(what, func() (string, error) { return "", v.create(ctx, snapshot) })
	return v
}

func (p *play) mount(ctx context.Context, v *volume, what string) {
	p.step(what, func() (string, error) { return "", v.mount(ctx) })
}

// snapshot takes a snapshot and returns its ID.
func (p *play) snapshot(ctx context.Context, v *volume, name string) (id string) {
	p.step("take snapshot "+name, func() (_ string, err error) {
		id, err = v.snapshot(ctx, name)
		return "", err
	})
	return id
}

// revert makes a mounted volume, in its place, what it was at a snapshot.
func (p *play) revert(ctx context.Context, v *volume, snapshot string) {
	p.step("unpublish and unstage the first volume", func() (string, error) { return "", v.unmount(ctx) })
	p.step("revert it in its place: image snapshot goto", func() (string, error) {
		_, err := p.world.run(ctx, "image", "snapshot", "goto", v.image(), snapshot)
		return "", err
	})
	p.mount(ctx, v, "stage and publish it again")
}

func (p *play) unmountAll(ctx context.Context) {
	p.title("The end")
	p.step("unpublish and unstage every volume", func() (string, error) {
		for _, v := range p.world.volumes {
			if err := v.unmount(ctx); err != nil {
				return "", err
			}
		}
		return fmt.Sprintf("%d volumes", len(p.world.volumes)), nil
	})
}

// outsider asks QEMU about each image.
func (p *play) outsider(ctx context.Context) {
	if p.err != nil {
		return
	}
	p.title("What QEMU says about the images")
	volumes, err := p.world.pool.Volumes()
	if err != nil {
		p.err = err
		return
	}
	for _, v := range volumes {
		path := p.world.pool.ImagePath(v.ID)
		for _, args := range [][]string{{"check"}, {"snapshot", "-l"}} {
			said, err := output(ctx, "qemu-img", append(args, path)...)
			if err != nil {
				p.err = err
				return
			}
			if said != "" {
				p.quote(fmt.Sprintf("qemu-img %s %s", strings.Join(args, " "), v.ID), said)
			}
		}
	}
}

// cleanUp deletes everything as a user does.
func (p *play) cleanUp(ctx context.Context) {
	p.title("Clean up")
	p.step("delete the snapshots and the volumes", func() (string, error) { return p.world.deleteAll(ctx) })
	p.step("nothing is left in the pool", func() (string, error) { return "", p.world.checkEmpty() })
}
