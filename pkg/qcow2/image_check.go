package qcow2

import "context"

// Check checks the image as it is on disk after a flush. Guest requests wait for it. progress, if not nil, is called
// with the bytes of L2 tables done and to do. An error means that it could not be checked.
func (img *Image) Check(ctx context.Context, progress func(done, total int64)) (CheckResult, error) {
	img.changeMu.Lock()
	defer img.changeMu.Unlock()
	img.gate.Lock()
	defer img.gate.Unlock()
	if err := img.usable(false); err != nil {
		return CheckResult{}, err
	}
	if !img.readOnly {
		if err := img.commit(); err != nil {
			return CheckResult{}, err
		}
		img.background.Wait()
		if err := img.alloc.endReservation(); err != nil {
			return CheckResult{}, err
		}
	}
	return checkImage(ctx, img.f, *img.hdr.Load(), progress)
}
