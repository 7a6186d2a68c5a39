package host

import (
	"errors"
	"sync"
	"sync/atomic"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
)

// CallsAtOnce is how many small reads or writes are under way together: one after the other, the disk would wait for us.
const CallsAtOnce = 8

// Together calls do with all numbers below n, in any order, some at the same time. Of errors it returns some.
func Together(n int, do func(i int) error) error {
	if n == 1 {
		return do(0)
	}
	var (
		all  sync.WaitGroup
		next atomic.Int64
		errs [CallsAtOnce]error
	)
	for w := range min(n, CallsAtOnce) {
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

// WriteAll makes writes that do not overlap; their order means nothing.
func WriteAll(f File, ws []format.MetaWrite) error {
	write := func(i int) error {
		_, err := f.WriteAt(ws[i].B, int64(ws[i].Off))
		return err
	}
	if len(ws) > CallsAtOnce {
		return Together(len(ws), write)
	}
	for i := range ws {
		if err := write(i); err != nil {
			return err
		}
	}
	return nil
}
