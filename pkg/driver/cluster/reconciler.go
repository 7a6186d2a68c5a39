package cluster

import (
	"context"
	"sync"
	"time"

	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/util/workqueue"
	"k8s.io/klog/v2"
)

const (
	firstRetry = time.Second
	lastRetry  = time.Minute
)

// reconciler hands the objects of a cache to a function, one at a time, whenever they have changed.
type reconciler struct {
	caches []cache.SharedIndexInformer // the first holds the objects, the others what the function looks up
	queue  workqueue.TypedRateLimitingInterface[string]
	// reconcile looks at the object of a key, which may be gone. After an error it is called again, at growing
	// intervals.
	reconcile func(ctx context.Context, key string) error
}

func newReconciler(name string, reconcile func(context.Context, string) error, caches ...cache.SharedIndexInformer) *reconciler {
	return &reconciler{
		caches:    caches,
		reconcile: reconcile,
		queue: workqueue.NewTypedRateLimitingQueueWithConfig(
			workqueue.NewTypedItemExponentialFailureRateLimiter[string](firstRetry, lastRetry),
			workqueue.TypedRateLimitingQueueConfig[string]{Name: name},
		),
	}
}

// run works until ctx ends.
func (r *reconciler) run(ctx context.Context) {
	enqueue := func(object any) {
		if key, err := cache.DeletionHandlingMetaNamespaceKeyFunc(object); err == nil {
			r.queue.Add(key)
		}
	}
	_, err := r.caches[0].AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc: enqueue, UpdateFunc: func(_, object any) { enqueue(object) }, DeleteFunc: enqueue,
	})
	if err != nil { // of a stopped cache only
		klog.FromContext(ctx).Error(err, "Objects are not watched")
		return
	}
	var group sync.WaitGroup
	defer group.Wait()
	for _, c := range r.caches {
		group.Go(func() { c.RunWithContext(ctx) })
	}
	defer r.queue.ShutDown()
	for _, c := range r.caches {
		if !cache.WaitForCacheSync(ctx.Done(), c.HasSynced) {
			return
		}
	}
	group.Go(func() {
		for r.next(ctx) {
		}
	})
	<-ctx.Done()
}

// next handles one object. False when the queue was shut down.
func (r *reconciler) next(ctx context.Context) bool {
	key, shutdown := r.queue.Get()
	if shutdown {
		return false
	}
	defer r.queue.Done(key)
	logger := klog.FromContext(ctx).WithValues("object", key)
	if err := r.reconcile(klog.NewContext(ctx, logger), key); err != nil {
		logger.V(2).Info("Will be tried again", "err", err)
		r.queue.AddRateLimited(key)
	} else {
		r.queue.Forget(key)
	}
	return true
}
