package holder

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// start runs a holder until stop is called, which waits for its end.
func start(t *testing.T, o Options) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Run(ctx, o) }()
	stop = func() {
		t.Helper()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("holder: %v", err)
		}
	}
	return stop
}

func socket(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "holder")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

// pipe returns an entry with the write end of a pipe, and the read end.
func pipe(t *testing.T) (e Entry, read int) {
	t.Helper()
	var p [2]int
	must(t, unix.Pipe2(p[:], unix.O_CLOEXEC|unix.O_NONBLOCK))
	t.Cleanup(func() { unix.Close(p[0]) })
	return Entry{State: []byte(`{"a":1}`), FDs: []int{p[1]}}, p[0]
}

// ended tells whether nobody has the write end any more.
func ended(t *testing.T, read int) bool {
	t.Helper()
	n, err := unix.Read(read, make([]byte, 1))
	if errors.Is(err, unix.EAGAIN) {
		return false
	}
	must(t, err)
	return n == 0
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); <-time.After(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for: %s", what)
		}
	}
}

func TestHold(t *testing.T) {
	path := socket(t)
	stop := start(t, Options{Socket: path})
	c, ctx := Client{path}, t.Context()
	e, read := pipe(t)
	must(t, c.Hold(ctx, "a", e))
	e.Close()
	if ended(t, read) {
		t.Fatal("the holder has nothing")
	}
	if err := c.Hold(ctx, "a", Entry{}); err == nil {
		t.Error("a name was held twice")
	}
	got, err := c.Get(ctx, "a")
	must(t, err)
	if !bytes.Equal(got.State, e.State) || len(got.FDs) != 1 {
		t.Fatalf("got %s and %d descriptors", got.State, len(got.FDs))
	}
	_, err = unix.Write(got.FDs[0], []byte("x"))
	must(t, err)
	got.Close()
	if n, err := unix.Read(read, make([]byte, 2)); n != 1 || err != nil {
		t.Errorf("read %d, %v: it was another file", n, err)
	}
	if names, err := c.List(ctx); err != nil || !slices.Equal(names, []string{"a"}) {
		t.Errorf("listed %q, %v", names, err)
	}
	must(t, c.Drop(ctx, "a"))
	must(t, c.Drop(ctx, "a"))
	if !ended(t, read) {
		t.Error("dropped, and still open")
	}
	if _, err := c.Get(ctx, "a"); !errors.Is(err, ErrNotHeld) {
		t.Errorf("get after drop: %v", err)
	}
	stop() // at once: nothing is held
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket is left: %v", err)
	}
}

// A holder that is told to end stays until another has taken over; its clients do not notice.
func TestSuccession(t *testing.T) {
	path := socket(t)
	c, ctx := Client{path}, t.Context()
	stop := start(t, Options{Socket: path})
	var reads []int
	for _, name := range []string{"a", "b", "c"} {
		e, read := pipe(t)
		must(t, c.Hold(ctx, name, e))
		e.Close()
		reads = append(reads, read)
	}
	for range 5 {
		told := make(chan struct{})
		first := stop
		go func() {
			defer close(told)
			first() // waits for the successor
		}()
		stop = start(t, Options{Socket: path})
		for done := false; !done; {
			select {
			case <-told:
				done = true
			default:
			}
			names, err := c.List(ctx)
			must(t, err)
			if len(names) != 3 {
				t.Fatalf("listed %q", names)
			}
		}
	}
	for i, name := range []string{"a", "b", "c"} {
		if ended(t, reads[i]) {
			t.Errorf("%s was lost", name)
		}
		must(t, c.Drop(ctx, name))
		if !ended(t, reads[i]) {
			t.Errorf("an earlier holder still has %s", name)
		}
	}
	stop()
}

// A successor that ends before its turn leaves everything as it is.
func TestSuccessorEnds(t *testing.T) {
	path := socket(t)
	c, ctx := Client{path}, t.Context()
	stop := start(t, Options{Socket: path})
	e, read := pipe(t)
	must(t, c.Hold(ctx, "a", e))
	e.Close()
	for range 3 {
		start(t, Options{Socket: path})()
	}
	if names, err := c.List(ctx); err != nil || len(names) != 1 || ended(t, read) {
		t.Fatalf("listed %q, %v", names, err)
	}
	must(t, c.Drop(ctx, "a"))
	stop()
}

// What nobody guards is given up after a time.
func TestPatience(t *testing.T) {
	path := socket(t)
	ctx := t.Context()
	c := Client{path}
	stop := start(t, Options{Socket: path, Patience: time.Millisecond})
	guarding, unguard := context.WithCancel(ctx)
	guarded := make(chan struct{})
	go func() { defer close(guarded); c.Guard(guarding) }()
	e, read := pipe(t)
	eventually(t, "the guard counts", func() bool {
		must(t, c.Drop(ctx, "a"))
		must(t, c.Hold(ctx, "a", e))
		<-time.After(20 * time.Millisecond)
		names, err := c.List(ctx)
		must(t, err)
		return len(names) == 1
	})
	e.Close()
	if ended(t, read) {
		t.Fatal("it was given up")
	}
	unguard()
	<-guarded
	eventually(t, "it is given up", func() bool { return ended(t, read) })
	stop()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A holder that gives all to its successor answers nobody any more: what it then took, or gave, the other would not know of.
func TestAnswersNobodyWhileItLeaves(t *testing.T) {
	path := socket(t)
	ctx := t.Context()
	c := Client{path}
	stop := start(t, Options{Socket: path})
	e, _ := pipe(t)
	must(t, c.Hold(ctx, "a", e))
	e.Close()
	early, err := dial(ctx, path) // its requests come in while the holder leaves
	must(t, err)
	defer early.Close()
	must(t, send(early, message{Op: opList}, nil))
	_, _, err = receive(early)
	must(t, err)

	// A successor that takes its time.
	heir, err := dial(ctx, path)
	must(t, err)
	defer heir.Close()
	must(t, send(heir, message{Op: opSucceed}, nil))
	ended := make(chan struct{})
	go func() { defer close(ended); stop() }()
	var got []Entry
	for {
		m, fds, err := receive(heir)
		must(t, err)
		if m.Done {
			break
		}
		got = append(got, Entry{FDs: fds})
	}
	if len(got) != 1 {
		t.Fatalf("it was given %d entries", len(got))
	}
	late, _ := pipe(t)
	must(t, send(early, message{Op: opHold, Name: "late"}, late.FDs))
	late.Close()
	must(t, send(heir, message{Done: true}, nil))
	if m, _, err := receive(early); err == nil && !m.Leaving {
		t.Errorf("it has answered %+v", m)
	}
	<-ended
	for _, e := range got {
		e.Close()
	}
}

// What is guarded is not given up, though it was decided a moment before.
func TestGuardComesLate(t *testing.T) {
	e, read := pipe(t)
	h := &holder{entries: map[string]Entry{"a": e}, guards: 1}
	h.abandon()
	if ended(t, read) || len(h.entries) != 1 {
		t.Error("it was given up")
	}
	h.guards = 0
	h.abandon()
	if !ended(t, read) || len(h.entries) != 0 {
		t.Error("it was kept")
	}
}

// An entry of which some descriptors do not fit a message is not held without them.
func TestTruncatedEntry(t *testing.T) {
	path := socket(t)
	c, ctx := Client{path}, t.Context()
	stop := start(t, Options{Socket: path})
	e, read := pipe(t)
	many := Entry{FDs: slices.Repeat(e.FDs, maxFDs+1)}
	if err := c.Hold(ctx, "a", many); err == nil {
		t.Error("it was held")
	}
	if names, err := c.List(ctx); err != nil || len(names) > 0 {
		t.Errorf("listed %q, %v", names, err)
	}
	e.Close()
	eventually(t, "the holder has closed what it got", func() bool { return ended(t, read) })
	stop()
}

// Descriptors that are to be closed last when a holder is killed have lower numbers than all others: the kernel begins with the
// highest.
func TestLastIsLast(t *testing.T) {
	path := socket(t)
	c, ctx := Client{path}, t.Context()
	stop := start(t, Options{Socket: path})
	for _, last := range []bool{false, true} {
		e, _ := pipe(t)
		e.Last = last
		must(t, c.Hold(ctx, "a", e))
		if e = e.settled(); (e.FDs[0] < highFDs) != last {
			t.Errorf("last %t has number %d", last, e.FDs[0])
		}
		e.Close()
		got, err := c.Get(ctx, "a")
		must(t, err)
		if got.Last != last {
			t.Errorf("last is %t", got.Last)
		}
		got.Close()
		must(t, c.Drop(ctx, "a"))
	}
	stop()
}
