package main

import (
	"errors"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// withImage opens the image at path for work and closes it afterwards.
func withImage(path string, readOnly bool, work func(*qcow2.Image) error) (err error) {
	img, err := openImage(path, readOnly)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, img.Close()) }()
	return work(img)
}

func openImage(path string, readOnly bool) (*qcow2.Image, error) {
	f, err := qcow2.OpenFile(path, readOnly)
	if err != nil {
		return nil, inUse(path, err)
	}
	return qcow2.Open(f, qcow2.OpenOptions{ReadOnly: readOnly})
}
