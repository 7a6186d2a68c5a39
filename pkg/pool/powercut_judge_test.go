package pool

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// judge starts on a state in a directory of its own. An error says which promise is broken:
//
//   - the pool opens if it was made, and starts without an error;
//   - each fact is what was promised; of an operation that was going on, the old or the new;
//   - nothing is left over;
//   - images are sound, and free of leaks where they are marked as clean;
//   - the pool can be used, and emptied.
func judge(ctx context.Context, home string, job powerJob) error {
	if err := job.Write(home); err != nil {
		return err
	}
	path := filepath.Join(home, "pool")
	p, err := Open(path)
	if errors.Is(err, ErrNotReady) && slices.ContainsFunc(job.allowed, func(f facts) bool { return f[factPool] == "" }) {
		if err = Init(path); err == nil {
			p, err = Open(path)
		}
		if err == nil {
			job.allowed = slices.Concat(job.allowed, []facts{{factPool: p.UUID()}})
		}
	}
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	if err := job.checkReserve(reserved(p)); err != nil {
		return err
	}
	if err := reconcile(p); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	f, err := readFacts(p)
	if err != nil {
		return fmt.Errorf("read: %w", err)
	}
	if err := errors.Join(job.compare(f), checkImages(ctx, p, f), checkLeftOver(path)); err != nil {
		return err
	}
	if job.goOn {
		return goOn(ctx, p, f)
	}
	return nil
}

// goOn starts once more, which changes nothing, and uses the pool up.
func goOn(ctx context.Context, p *Pool, before facts) error {
	if err := reconcile(p); err != nil {
		return fmt.Errorf("start again: %w", err)
	}
	again, err := readFacts(p)
	if err != nil || !maps.Equal(before, again) {
		return fmt.Errorf("another start has changed %v to %v: %w", before, again, err)
	}
	return useUp(ctx, p)
}

// compare compares a pool with what was promised.
func (p promise) compare(found facts) error {
	keys := map[string]bool{}
	for _, f := range slices.Concat(p.allowed, []facts{found}) {
		for key := range f {
			keys[key] = key != factReserve
		}
	}
	var broken []error
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		var allowed []string
		for _, f := range p.allowed {
			allowed = append(allowed, f[key])
		}
		if keys[key] && !slices.Contains(allowed, found[key]) {
			broken = append(broken, fmt.Errorf("%s: found %q, promised %q", key, found[key], slices.Compact(allowed)))
		}
	}
	return errors.Join(broken...)
}

// checkReserve: it may be larger than was promised.
func (p promise) checkReserve(found int64) error {
	for _, f := range p.allowed {
		promised, err := strconv.ParseInt(f[factReserve], 10, 64)
		if err != nil || found >= promised {
			return nil //nolint:nilerr // there was none
		}
	}
	return fmt.Errorf("the reserve has %d bytes, less than was promised", found)
}

func checkLeftOver(path string) error {
	found, err := leftOver(path)
	if len(found) > 0 {
		err = fmt.Errorf("left over: %q", found)
	}
	return err
}

// checkImages checks every image.
func checkImages(ctx context.Context, p *Pool, f facts) error {
	volumes, err := p.Volumes()
	for _, v := range volumes {
		l, lockErr := p.Lock(v.ID)
		if lockErr != nil {
			return lockErr
		}
		image, openErr := l.Open(true)
		if openErr != nil {
			return errors.Join(openErr, l.Unlock())
		}
		result, checkErr := image.Check(ctx, nil)
		err = errors.Join(err, checkErr, image.Close(), l.Unlock())
		unclean := f[string(Clean)+" "+v.ID] == `false ""`
		if status := result.ExitStatus(); status != 0 && (status != 3 || !unclean) {
			err = errors.Join(err, fmt.Errorf("image of %s, unclean %v: %v", v.ID, unclean, result.Problems))
		}
	}
	return err
}

// useUp makes use of every volume, and empties the pool.
func useUp(ctx context.Context, p *Pool) error {
	volumes, err := p.Volumes()
	for _, v := range volumes {
		err = errors.Join(err, use(ctx, p, v))
	}
	if err == nil {
		err = p.KeepReserve()
	}
	if err == nil {
		err = checkLeftOver(p.Dir())
	}
	if left, listErr := p.Volumes(); err == nil && (listErr != nil || len(left) > 0 || reserved(p) > 0) {
		err = fmt.Errorf("after all was deleted: %v, a reserve of %d bytes: %w", left, reserved(p), listErr)
	}
	if err != nil {
		return fmt.Errorf("going on: %w", err)
	}
	return nil
}

func use(ctx context.Context, p *Pool, v Volume) error {
	if !v.Tombstone {
		again := Volume{ID: p.NewID(v.Name), Name: v.Name}
		if err := p.Create(ctx, again, fillSmall); !errors.Is(err, ErrExists) {
			return fmt.Errorf("create %s again: %w", v.Name, err)
		}
	}
	s := PendingSnapshot{Name: "another", Created: time.Unix(3, 0).UTC()}
	err := errors.Join(p.Mark(v.ID, Frozen, []byte("note")), p.Unmark(v.ID, Frozen), p.AddPendingSnapshot(v.ID, s))
	if all, listErr := p.PendingSnapshots(v.ID); listErr != nil || !slices.Contains(all, s) {
		err = errors.Join(err, fmt.Errorf("pending: %v, %w", all, listErr))
	}
	l, lockErr := p.Lock(v.ID)
	if lockErr != nil {
		return errors.Join(err, lockErr)
	}
	err = errors.Join(err, l.MarkAttached())
	image, openErr := l.Open(false)
	if openErr != nil {
		return errors.Join(err, openErr, l.Unlock())
	}
	_, writeErr := image.WriteAt([]byte("written"), 0)
	_, snapshotErr := image.CreateSnapshot(ctx, "another", nil)
	return errors.Join(err, writeErr, snapshotErr, image.DeleteSnapshot(ctx, qcow2.ByName("another")), image.Close(), l.ClearAttached(),
		l.Update(func(v *Volume) { v.Parameters = map[string]string{"a": "b"} }), l.Remove(), l.Unlock())
}
