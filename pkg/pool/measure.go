package pool

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// measure returns how many bytes an image occupies, and its header, whoever writes to it; zeros for what is not to be found out.
func measure(d dir, image string) (allocated int64, h qcow2.Header) {
	f, err := openImage(d, image)
	if err != nil {
		return 0, h
	}
	defer f.Close()
	var st unix.Stat_t
	if err := control(f, func(fd int) error { return unix.Fstat(fd, &st) }); err != nil {
		return 0, h
	}
	h, _ = qcow2.Probe(f)
	return st.Blocks * 512, h
}

func openImage(d dir, image string) (*os.File, error) {
	if err := d.expect(image, 0); err != nil {
		return nil, err
	}
	return d.OpenFile(image, os.O_RDONLY|unix.O_NONBLOCK, 0)
}
