package engine

import (
	"context"
	"testing"
)

func TestKeyLock(t *testing.T) {
	var k keyLock
	unlock, err := k.lock(t.Context(), "a")
	must(t, err)
	other, err := k.lock(t.Context(), "b") // does not wait
	must(t, err)
	other()

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err = k.lock(ctx, "a")
	wantErr(t, err, context.Canceled)

	got := make(chan func())
	go func() {
		unlock, _ := k.lock(t.Context(), "a")
		got <- unlock
	}()
	select {
	case <-got:
		t.Fatal("two hold one lock")
	default:
	}
	unlock()
	(<-got)()
	if len(k.slots) != 0 {
		t.Fatalf("%d slots are left", len(k.slots))
	}
}
