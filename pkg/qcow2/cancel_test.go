package qcow2

import (
	"context"
	"errors"
	"runtime"
	"testing"
	"time"
)

// An operation whose context has ended, before it or while it builds, changes nothing, and the image goes on.
func TestCancelledOperation(t *testing.T) {
	for name, c := range map[string]struct {
		op     func(ctx context.Context, img *Image) error
		before Phase // the last one before the build
	}{
		"create": {func(ctx context.Context, img *Image) error { _, err := img.CreateSnapshot(ctx, "new", nil); return err }, PhaseCommit},
		"delete": {func(ctx context.Context, img *Image) error { return img.DeleteSnapshot(ctx, ByName("old")) }, PhaseCommit},
		"rename": {func(ctx context.Context, img *Image) error { return img.RenameSnapshot(ctx, ByName("old"), "new") }, PhaseCommit},
		"goto":   {func(ctx context.Context, img *Image) error { return img.GotoSnapshot(ctx, ByName("old")) }, PhaseCut},
		"grow":   {func(ctx context.Context, img *Image) error { return img.Resize(ctx, 2<<20) }, PhaseCut},
		"drop":   {func(ctx context.Context, img *Image) error { return img.DropActive(ctx) }, PhaseCut},
	} {
		t.Run(name, func(t *testing.T) {
			f := newMemFile(name)
			must(t, Create(t.Context(), f, 1<<20, CreateOptions{}))
			var img *Image
			var cancel func()
			img, err := Open(f, OpenOptions{Trace: func(p Phase, _ time.Duration) {
				if p != c.before || cancel == nil {
					return
				}
				for cancel(); img.build.cancelled.Load() == nil; { // a goroutine of the context's tells it
					runtime.Gosched()
				}
			}})
			must(t, err)
			must(t, errOf(img.WriteAt([]byte("old"), 0)))
			must(t, errOf(img.CreateSnapshot(t.Context(), "old", nil)))
			must(t, errOf(img.WriteAt([]byte("new"), 0)))

			for _, when := range []string{"before", "while it builds"} {
				ctx, end := context.WithCancel(t.Context())
				if when == "before" {
					end()
				} else {
					cancel = end
				}
				if err := c.op(ctx, img); !errors.Is(err, context.Canceled) {
					t.Errorf("cancelled %s it returned %v", when, err)
				}
				end()
				cancel = nil
			}
			content := make([]byte, 3)
			must(t, errOf(img.ReadAt(content, 0)))
			if all := img.Snapshots(); len(all) != 1 || all[0].Name != "old" || img.Size() != 1<<20 || string(content) != "new" {
				t.Errorf("there are %v, %d bytes and %q", all, img.Size(), content)
			}
			must(t, c.op(t.Context(), img))
			must(t, img.Close())
			checkSaved(t, f)
		})
	}
}
