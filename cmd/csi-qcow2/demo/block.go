package demo

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
)

const (
	blockSize = 256 << 20 // bytes of the raw volume
	pieceSize = 1 << 20
	filled    = "filled" // the snapshot's name
)

// blockDevice plays the life of a raw block volume.
func (p *play) blockDevice(ctx context.Context) {
	p.title("A raw block device")
	p.block = p.create(ctx, fmt.Sprintf("create a volume of %d MiB", blockSize>>20), p.world.newVolume("block", blockSize, rawBlock()), "")
	p.mount(ctx, p.block, "stage and publish it: attach")
	var sum string
	p.step("fill it with noise", func() (_ string, err error) {
		if err := writeNoise(ctx, p.block.path(), 1, blockSize, 0); err != nil {
			return "", err
		}
		sum, err = checksum(p.block.path(), blockSize)
		return "SHA-256 " + sum[:min(16, len(sum))] + "…", err
	})
	snapshot := p.snapshot(ctx, p.block, filled)
	p.step("overwrite every other MiB", func() (string, error) {
		if err := writeNoise(ctx, p.block.path(), 2, blockSize, pieceSize); err != nil {
			return "", err
		}
		now, err := checksum(p.block.path(), blockSize)
		if err == nil && now == sum {
			err = errors.New("the checksum is still the same")
		}
		return "", err
	})
	restored := p.world.newVolume("block-restored", blockSize, rawBlock())
	p.create(ctx, "restore the snapshot into a new volume", restored, snapshot)
	p.mount(ctx, restored, "stage and publish it")
	p.verify(restored, sum)
	p.revert(ctx, p.block, filled)
	p.verify(p.block, sum)
}

// verify compares the checksum of a volume.
func (p *play) verify(v *volume, sum string) {
	p.step("compare the checksum", func() (string, error) {
		now, err := checksum(v.path(), v.size)
		if err == nil && now != sum {
			err = fmt.Errorf("want %s, have %s", sum, now)
		}
		return "equal", err
	})
}

// checksum reads a whole device and returns its SHA-256.
func checksum(device string, size int64) (string, error) {
	sum, n, err := hashFile(device)
	if err == nil && n != size {
		err = fmt.Errorf("%s has %d bytes, not %d", device, n, size)
	}
	return sum, err
}

// writeNoise writes length bytes of pseudo-random data, in pieces with a gap after each, over a device or into
// a new file, and makes them durable.
func writeNoise(ctx context.Context, path string, seed byte, length, gap int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	noise, piece := rand.NewChaCha8([32]byte{seed}), make([]byte, pieceSize)
	for off := int64(0); off < length && err == nil; off += pieceSize + gap {
		if err = ctx.Err(); err != nil {
			break
		}
		_, _ = noise.Read(piece) // never fails
		_, err = f.WriteAt(piece, off)
	}
	return errors.Join(err, f.Sync(), f.Close())
}
