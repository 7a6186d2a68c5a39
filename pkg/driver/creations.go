package driver

import (
	"context"
	"fmt"
	"sync"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// creations are the volumes that are being made. A copy outlives the call that began it, which times
// out after seconds; the repeated call joins it.
type creations struct {
	ctx     context.Context // ends when the plugin shuts down
	mu      sync.Mutex
	running map[string]*creation // by CSI name, guarded by mu
	group   sync.WaitGroup
}

type creation struct {
	request volumeRequest
	done    chan struct{} // closed when volume and err are set
	volume  pool.Volume
	err     error
}

func newCreations(ctx context.Context) *creations {
	return &creations{ctx: ctx, running: map[string]*creation{}}
}

// join waits for the creation that a request asks for, which it starts if none of that name runs. errBusy
// if one runs that asks for something else.
func (c *creations) join(
	ctx context.Context, request volumeRequest, create func(context.Context) (pool.Volume, error),
) (pool.Volume, error) {
	job, err := c.start(request, create)
	if err != nil {
		return pool.Volume{}, err
	}
	select {
	case <-job.done:
		return job.volume, job.err
	case <-ctx.Done():
		return pool.Volume{}, fmt.Errorf("volume %q is still being made: %w", request.name, ctx.Err())
	}
}

func (c *creations) start(
	request volumeRequest, create func(context.Context) (pool.Volume, error),
) (*creation, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.ctx.Err(); err != nil {
		return nil, err
	}
	if job := c.running[request.name]; job != nil {
		if job.request != request {
			return nil, fmt.Errorf("volume %q with other parameters: %w", request.name, errBusy)
		}
		return job, nil
	}
	job := &creation{request: request, done: make(chan struct{})}
	c.running[request.name] = job
	c.group.Go(func() {
		defer c.end(job)
		job.volume, job.err = create(c.ctx)
	})
	return job, nil
}

// end publishes a creation's result. One that panicked has failed.
func (c *creations) end(job *creation) {
	if fault := recover(); fault != nil {
		job.err = panicked(c.ctx, fault)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.running, job.request.name)
	close(job.done)
}

// wait returns when the last creation has ended. The context must have.
func (c *creations) wait() { c.group.Wait() }
