package engine

import (
	"context"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/api"
)

// slowWorker answers each question when it is let, with the number of the question as the size.
type slowWorker struct {
	api.EngineClient
	asked   chan struct{}
	answers chan int64
}

func (w *slowWorker) List(context.Context, *api.ListRequest, ...grpc.CallOption) (*api.ListResponse, error) {
	w.asked <- struct{}{}
	return &api.ListResponse{Attachments: []*api.Attachment{{Size: <-w.answers}}}, nil
}

// waitContext tells when somebody begins to wait with it.
type waitContext struct {
	context.Context //nolint:containedctx // it is one
	began           func()
}

func (c waitContext) Deadline() (time.Time, bool) {
	c.began()
	return c.Context.Deadline()
}

// Who asks for one volume gets no answer that is older than the call; who asks for all gets what is known.
func TestStatusIsFresh(t *testing.T) {
	w := &slowWorker{asked: make(chan struct{}, 1), answers: make(chan int64)}
	p := &process{volume: "v", api: w, done: make(chan struct{})}
	get := func(ask func(context.Context) (*api.Attachment, error)) chan *api.Attachment {
		got := make(chan *api.Attachment, 1)
		go func() {
			a, err := ask(t.Context())
			if err != nil {
				t.Error(err)
			}
			got <- a
		}()
		return got
	}
	first := get(p.status)
	<-w.asked
	w.answers <- 1
	if a := <-first; a.GetSize() != 1 {
		t.Errorf("the first answer is %v", a)
	}

	listed := get(p.lastStatus)
	<-w.asked
	if a := <-listed; a.GetSize() != 1 || !a.GetSilent() {
		t.Errorf("listed as %v while the worker is silent", a)
	}
	waits := make(chan struct{})
	second := get(func(ctx context.Context) (*api.Attachment, error) {
		return p.status(waitContext{ctx, sync.OnceFunc(func() { close(waits) })})
	})
	<-waits // for the list's question, which is not answered
	w.answers <- 2
	<-w.asked
	w.answers <- 3
	if a := <-second; a.GetSize() != 3 || a.GetSilent() {
		t.Errorf("the answer to a later call is %v", a)
	}
}
