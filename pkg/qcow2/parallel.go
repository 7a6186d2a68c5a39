package qcow2

import (
	"errors"
	"sync"
	"sync/atomic"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// callsAtOnce is how many small reads or writes are under way together: one after the other, the disk would wait for us.
const callsAtOnce = 8

// together calls do with all numbers below n, in any order, some at the same time. Of errors it returns some.
func together(n int, do func(i int) error) error {
	if n == 1 {
		return do(0)
	}
	var (
		all  sync.WaitGroup
		next atomic.Int64
		errs [callsAtOnce]error
	)
	for w := range min(n, callsAtOnce) {
		all.Go(func() {
			for errs[w] == nil {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				errs[w] = do(i)
			}
		})
	}
	all.Wait()
	return errors.Join(errs[:]...)
}

// writeAll makes writes that do not overlap; their order means nothing.
func writeAll(f File, ws []format.MetaWrite) error {
	write := func(i int) error {
		_, err := f.WriteAt(ws[i].B, ws[i].Off)
		return err
	}
	if len(ws) > callsAtOnce {
		return together(len(ws), write)
	}
	for i := range ws {
		if err := write(i); err != nil {
			return err
		}
	}
	return nil
}
