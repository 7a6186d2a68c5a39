package fsck

import (
	"encoding/binary"
	"fmt"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/format"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2/internal/host"
)

// Verify walks through all metadata of an image for which nothing vouches. ErrCorrupt, and nothing changed, if a cluster is
// counted less often than it is referenced, or anything else contradicts the format. COPIED flags that the counts do not
// allow are cleared: without them a write goes elsewhere.
func Verify(f host.File, h format.Header) error {
	c, err := newChecker(func() error { return nil }, f, h, nil)
	if err == nil {
		err = c.check()
	}
	if err != nil {
		return fmt.Errorf("verify what others have written: %w", err)
	}
	if n := c.result.Corruptions - c.harmless; n+c.result.Errors > 0 {
		return fmt.Errorf("%w: others have written it, and %d of its references and counts cannot be right (%s): to write would destroy data; %w",
			format.ErrCorrupt, max(n, 1), c.worst, ErrNeedsRepair)
	}
	if err := c.clearCopied(); err != nil {
		return fmt.Errorf("clear COPIED flags of clusters that are shared: %w", err)
	}
	return nil
}

// clearCopied clears the flags that check has found on clusters that are not counted once.
func (c *checker) clearCopied() error {
	for at, size := range c.miscopied {
		b := make([]byte, size)
		if err := format.ReadPadded(c.file, b, at); err != nil {
			return err
		}
		stride := int64(8)
		if at != c.h.L1Offset {
			stride = c.g.L2EntrySize()
		}
		var dirty format.SectorSet
		for i := int64(0); i < size; i += stride {
			e := binary.BigEndian.Uint64(b[i:])
			if e&(format.FlagCopied|format.FlagCompressed) == format.FlagCopied && e&format.OffsetMask != 0 && c.stored(format.HostOffset(e&format.OffsetMask)) != 1 {
				binary.BigEndian.PutUint64(b[i:], e&^format.FlagCopied)
				dirty.Add(i / format.SectorSize)
			}
		}
		if err := host.WriteAll(c.file, dirty.Parts(b, at)); err != nil {
			return err
		}
	}
	if len(c.miscopied) == 0 {
		return nil
	}
	return c.file.Sync()
}
