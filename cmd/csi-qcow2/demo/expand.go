package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

const (
	xfsSize   = 512 << 20
	noiseSize = 64 << 20
)

// expand makes volumes larger while they are in use.
func (p *play) expand(ctx context.Context) {
	p.title("Expand, online")
	p.expandXFS(ctx)
	if mayResizeExt4() {
		p.step("double the ext4 volume", func() (string, error) { return growFileSystem(ctx, p.files) })
		p.compare(ctx, p.files, p.equal)
	} else {
		p.note("(ext4 grows online only for a root with CAP_SYS_RESOURCE; this one has not)")
	}
	p.step("double the raw block volume", func() (string, error) {
		if err := p.block.grow(ctx, 2*blockSize); err != nil {
			return "", err
		}
		size, err := deviceSize(p.block.path())
		if err == nil && size != 2*blockSize {
			err = fmt.Errorf("it has %d bytes", size)
		}
		return fmt.Sprintf("from %d to %d MiB", blockSize>>20, size>>20), err
	})
}

func (p *play) expandXFS(ctx context.Context) {
	v := p.world.newVolume("files-xfs", xfsSize, fileSystem("xfs"))
	p.create(ctx, fmt.Sprintf("create a volume of %d MiB", xfsSize>>20), v, "")
	p.mount(ctx, v, "stage, publish: attach, format (XFS), mount")
	noise, before := filepath.Join(v.path(), "noise"), ""
	p.step("write a file of noise", func() (_ string, err error) {
		if err := writeNoise(ctx, noise, 3, noiseSize, 0); err != nil {
			return "", err
		}
		before, err = checksum(noise, noiseSize)
		return "", err
	})
	p.step("double the XFS volume", func() (string, error) { return growFileSystem(ctx, v) })
	p.inCluster("kubectl edit pvc files-xfs")
	p.step("compare the checksum", func() (string, error) {
		now, err := checksum(noise, noiseSize)
		if err == nil && now != before {
			err = errors.New("it is another one")
		}
		return "equal", err
	})
}

// growFileSystem doubles a volume and looks at the size that its file system has then.
func growFileSystem(ctx context.Context, v *volume) (string, error) {
	before, err := fsSize(v.path())
	if err != nil {
		return "", err
	}
	if err := v.grow(ctx, 2*v.size); err != nil {
		return "", err
	}
	after, err := fsSize(v.path())
	if err == nil && after < before*3/2 {
		err = fmt.Errorf("the file system had %d MiB and has %d", before>>20, after>>20)
	}
	return fmt.Sprintf("from %d to %d MiB, as df shows it", before>>20, after>>20), err
}

// fsSize returns the size of the file system that is mounted at path.
func fsSize(path string) (int64, error) {
	var s unix.Statfs_t
	err := unix.Statfs(path, &s)
	return int64(s.Blocks) * s.Bsize, err
}

func deviceSize(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.Seek(0, io.SeekEnd)
}

// mayResizeExt4 tells whether this process has the capability that ext4 asks for; a virtual machine's root
// may lack it.
func mayResizeExt4() bool {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return false
	}
	_, set, _ := bytes.Cut(status, []byte("CapEff:"))
	set, _, _ = bytes.Cut(set, []byte("\n"))
	capabilities, err := strconv.ParseUint(string(bytes.TrimSpace(set)), 16, 64)
	return err == nil && capabilities&(1<<unix.CAP_SYS_RESOURCE) != 0
}
