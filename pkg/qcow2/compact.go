package qcow2

import "fmt"

// PunchFree gives the blocks of all free clusters back to the file system, also of those that others have freed without doing
// so, and commits first. Guests wait.
func (img *Image) PunchFree() (err error) {
	img.changeMu.Lock()
	defer img.changeMu.Unlock()
	img.gate.Lock()
	defer img.gate.Unlock()
	if err := img.usable(true); err != nil {
		return err
	}
	img.background.Wait()
	if err := img.commit(); err != nil {
		return err
	}
	if err := img.alloc.punchAll(); err != nil {
		return fmt.Errorf("%s: give back free clusters: %w", img.f.Name(), err)
	}
	return nil
}

// punchAll punches all free clusters.
func (a *allocator) punchAll() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	counted := int64(1) << a.g.blockBits // by one block
	for first, end := int64(0), a.g.clusters(a.length.Load()); first < end; first += counted {
		b, err := a.rc.block(first >> a.g.blockBits)
		if err != nil {
			return err
		}
		if b == nil { // none of them is in use
			if err := a.punchHole(run{first, counted}); err != nil {
				return err
			}
			continue
		}
		for i := b.counts.nextZero(0); i < counted; {
			next := b.counts.nextNonzero(i)
			if err := a.punchHole(run{first + i, next - i}); err != nil {
				return err
			}
			i = b.counts.nextZero(next)
		}
	}
	return nil
}
