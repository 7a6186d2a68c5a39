package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// volume is attached to an engine of its own.
type volume struct {
	id     string
	device string
	engine *engine.Client
	pool   *pool.Pool
	end    func() error // also removes the pool
}

// attach makes a pool in a directory, and in it a volume of the image that makeImage makes, and attaches that.
func (b *bench) attach(ctx context.Context, parent string, size int64, makeImage func(path string) error) (*volume, error) {
	dir, err := os.MkdirTemp(parent, "pool")
	if err != nil {
		return nil, err
	}
	home, socket := filepath.Join(dir, "pool"), filepath.Join(dir, "engine")
	if err := errors.Join(os.Mkdir(home, 0o700), pool.Init(home)); err != nil {
		return nil, err
	}
	p, err := pool.Open(home)
	if err != nil {
		return nil, err
	}
	v := pool.Volume{ID: p.NewID("bench"), Name: "bench", Size: size, Created: time.Now()}
	if err := p.Create(ctx, v, func(_ context.Context, path string) error { return makeImage(path) }); err != nil {
		return nil, err
	}
	server, err := startServer(b.program, "engine", "--listen=unix://"+socket, "--pool="+home)
	if err != nil {
		return nil, err
	}
	client, err := engine.NewClient("unix://" + socket)
	if err != nil {
		return nil, errors.Join(err, server.stop())
	}
	var device engine.Device
	for deadline := time.Now().Add(30 * time.Second); device.Path == "" && time.Now().Before(deadline); {
		if device, err = client.Attach(ctx, v.ID); err != nil {
			<-time.After(50 * time.Millisecond)
		}
	}
	end := func() error {
		return errors.Join(client.Detach(context.WithoutCancel(ctx), v.ID), client.Close(), server.stop(), os.RemoveAll(dir))
	}
	if err != nil {
		return nil, errors.Join(err, end())
	}
	return &volume{v.ID, device.Path, client, p, end}, nil
}
