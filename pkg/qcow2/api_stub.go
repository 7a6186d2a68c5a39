package qcow2

import "context"

// ===== TEMPORARY: signatures others build against; replaced by the real files. =====

// Check. Result.ExitStatus(): as qemu-img check: 0, 2 corrupt, 3 leaks.
func (img *Image) Check(ctx context.Context, progress func(done, total int64)) (CheckResult, error) {
	panic("stub")
}
