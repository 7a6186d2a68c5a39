package engine

import (
	"context"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/api"
	"github.com/csi-qcow2/csi-qcow2/pkg/engine/rpc"
)

const (
	// statusPatience is how long a worker may take to say how it is, before it counts as stalled.
	statusPatience = 5 * time.Second
	// listPatience is how long a list of all volumes waits for any of their workers, once: what a worker said before is
	// listed until it is stalled.
	listPatience = 250 * time.Millisecond
)

// asked is what a worker was asked and has said of itself. There is one question at a time: whoever asks while it is not
// answered waits for the same answer.
type asked struct {
	mu      sync.Mutex      // guards the below
	pending *question       // nil: none
	last    *api.Attachment // the last answer, nil: none yet; not changed any more
}

type question struct {
	since  time.Time
	done   chan struct{} // closed when it is answered
	answer *api.Attachment
	err    error
}

// ask returns the unanswered question, or asks now. The question ends with the connection to the worker at the latest.
func (p *process) ask(ctx context.Context) (q *question, now bool) {
	p.asked.mu.Lock()
	defer p.asked.mu.Unlock()
	if p.asked.pending != nil {
		return p.asked.pending, false
	}
	q = &question{since: time.Now(), done: make(chan struct{})}
	p.asked.pending = q
	go func() {
		q.answer, q.err = p.question(context.WithoutCancel(ctx))
		p.asked.mu.Lock()
		defer p.asked.mu.Unlock()
		p.asked.pending = nil
		if q.err == nil {
			p.asked.last = q.answer
		}
		close(q.done)
	}()
	return q, true
}

// said returns the worker's last answer, nil if there was none.
func (p *process) said() *api.Attachment {
	p.asked.mu.Lock()
	defer p.asked.mu.Unlock()
	return p.asked.last
}

func (p *process) question(ctx context.Context) (*api.Attachment, error) {
	r, err := p.api.List(ctx, &api.ListRequest{})
	if err != nil {
		return nil, rpc.Refuse(ErrUnavailable, "its worker does not answer: %w", err)
	}
	if len(r.GetAttachments()) != 1 {
		return nil, rpc.Refuse(ErrUnavailable, "its worker serves nothing")
	}
	return r.GetAttachments()[0], nil
}

// status asks the worker what it serves. Nobody changes the answer, which others have, too. It is not older than the call: a
// question that was asked before is waited for, and another one asked.
func (p *process) status(ctx context.Context) (*api.Attachment, error) {
	q, now := p.ask(ctx)
	if !now {
		if _, err := p.await(ctx, q, statusPatience); err != nil {
			return nil, err
		}
		q, _ = p.ask(ctx)
	}
	return p.await(ctx, q, statusPatience)
}

// lastStatus is status for those who ask many: without an answer soon, it returns the last one until it is too old.
func (p *process) lastStatus(ctx context.Context) (*api.Attachment, error) {
	q, _ := p.ask(ctx)
	last := p.said()
	if last == nil {
		return p.await(ctx, q, statusPatience)
	}
	a, err := p.await(ctx, q, listPatience)
	if err != nil && ctx.Err() == nil && time.Since(q.since) < statusPatience && p.death() == nil {
		last = proto.CloneOf(last)
		last.Silent = true
		return last, nil
	}
	return a, err
}

// await waits for the answer of a question until that is older than patience.
func (p *process) await(ctx context.Context, q *question, patience time.Duration) (*api.Attachment, error) {
	ctx, cancel := context.WithDeadline(ctx, q.since.Add(patience))
	defer cancel()
	select {
	case <-q.done:
		return q.answer, q.err
	case <-ctx.Done():
		return nil, rpc.Refuse(ErrUnavailable, "its worker has not answered for %s: it is stopped, or waits for the pool's disk",
			time.Since(q.since).Round(time.Second))
	}
}
