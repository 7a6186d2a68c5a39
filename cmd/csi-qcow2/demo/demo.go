// Package demo plays the whole life of two volumes, a mounted file system and a raw block device, against a
// real engine and a real CSI plugin on a temporary pool, and checks every byte on the way.
package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"
)

// Options of a demonstration.
type Options struct {
	Program string // this program's executable: it is started as engine, as plugin, and as image tool
	Version string
	Dir     string // where the temporary directory is made, on a disk
	Source  string // the directory whose tree is copied into the volume
	In      io.Reader
	Out     io.Writer
	Err     io.Writer // of the shell that Keep starts
	Colour  bool      // Out is a terminal that shows some
	Width   int       // columns of Out
	Pause   bool      // wait for a line of In before each step
	Keep    bool      // start a shell on In before everything is taken down
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
	p := &play{report: &report{w: o.Out, colour: o.Colour, width: min(o.Width, maxWidth)}, world: w, source: o.Source}
	defer func() {
		if err != nil {
			fmt.Fprintf(o.Out, "\nTaking everything down.\n")
		}
		down, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTime)
		defer cancel()
		err = errors.Join(err, w.close(down))
		if err == nil {
			p.sum(time.Since(start))
		}
	}()
	fmt.Fprintf(o.Out, "csi-qcow2 %s: the life of two volumes\nover the CSI socket, in %s\n", o.Version, w.dir)
	if o.Pause {
		p.pause = pauser(ctx, o.In, o.Out, o.Colour)
	}
	p.start(ctx)
	p.fileSystem(ctx)
	p.blockDevice(ctx)
	p.expand(ctx)
	p.sourceDeleted(ctx)
	if o.Keep {
		p.keep(ctx, o.In, o.Out, o.Err)
	}
	p.unmountAll(ctx)
	p.outsider(ctx)
	p.cleanUp(ctx)
	if p.err != nil && ctx.Err() == nil {
		fmt.Fprint(o.Out, w.logs())
	}
	return p.err
}

// proved is what the steps have shown when all have gone well.
func proved() []string {
	return []string{
		"A snapshot of a volume in use, while files are written, holds what was there at its instant, and nothing of what came later.",
		"A volume restored from a snapshot equals the original, for a file system and for a raw block device; so does one that is reverted in its place.",
		"Volumes grow while they are in use, and keep their content.",
		"A snapshot outlives its volume, and restores it.",
		"QEMU finds no fault in any image, and lists the same snapshots.",
	}
}

func (r *report) sum(took time.Duration) {
	fmt.Fprintf(r.w, "\nDone in %.0f s. No mount, device, process or file is left.\n", took.Seconds())
	fmt.Fprint(r.w, "\nWhat was proved, each file and each byte compared:\n")
	for _, text := range proved() {
		fmt.Fprintln(r.w, " - "+folded(text, r.width, "   "))
	}
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
	p.step("start engine and CSI plugin on a new pool", func() (string, error) {
		return "", p.world.start(ctx)
	})
	p.step("read the original", func() (_ string, err error) {
		p.tree, err = readTree(ctx, p.source)
		return p.source + ": " + p.tree.String(), err
	})
	p.show(ctx, "csi-qcow2", "pool", "status", ".")
}

// create returns a new volume, empty or from a snapshot.
func (p *play) create(ctx context.Context, what string, v *volume, snapshot string) *volume {
	p.step(what, func() (string, error) { return "", v.create(ctx, snapshot) })
	if snapshot == "" {
		p.inCluster("kubectl apply -f claim.yaml")
	} else {
		p.inCluster("kubectl apply -f restore.yaml")
	}
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
	p.inCluster("kubectl apply -f snapshot.yaml")
	return id
}

// revert makes a mounted volume, in its place, what it was at a snapshot.
func (p *play) revert(ctx context.Context, v *volume, snapshot string) {
	p.step("unpublish and unstage the volume "+v.name, func() (string, error) { return "", v.unmount(ctx) })
	p.note("and revert it in its place:")
	p.show(ctx, "csi-qcow2", "image", "snapshot", "goto", v.shortImage(), snapshot)
	p.space()
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
		image := "volumes/" + v.ID + "/" + filepath.Base(p.world.pool.ImagePath(v.ID))
		p.show(ctx, "qemu-img", "check", image)
		if snapshots, err := p.world.pool.Snapshots(v.ID); err == nil && len(snapshots) > 0 {
			p.show(ctx, "qemu-img", "snapshot", "-l", image)
		}
	}
}

// show runs a command in the pool's directory, as a user would, and shows what it says.
func (p *play) show(ctx context.Context, words ...string) {
	p.command(words, func() (string, error) { return p.world.shell(ctx, words...) })
}

// space separates what a command has said from the next step.
func (p *play) space() {
	if p.err == nil {
		fmt.Fprintln(p.w)
	}
}

// cleanUp deletes everything as a user does.
func (p *play) cleanUp(ctx context.Context) {
	p.title("Clean up")
	p.step("delete the snapshots and the volumes", func() (string, error) { return p.world.deleteAll(ctx) })
	p.step("nothing is left in the pool", func() (string, error) { return "", p.world.checkEmpty() })
}
