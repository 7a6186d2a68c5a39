package engine

import (
	"errors"
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// largeVolume attaches a volume whose snapshots take a while: all of it is mapped.
func (r *rig) largeVolume() string {
	r.t.Helper()
	id := r.newVolume("large", mib)
	run(r.t, "qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", r.pool.ImagePath(id), "64G")
	r.attach(id)
	return id
}

// A snapshot that takes long is answered with as soon as its instant has passed, again and again, until it is whole:
// always as the same snapshot.
func TestPendingSnapshot(t *testing.T) {
	r := newRig(t)
	r.inProcess(hooks{answerAfter: time.Nanosecond})
	id := r.largeVolume()
	first, err := r.client.CreateSnapshot(testContext(t), id, "s", nil)
	must(t, err)
	if !first.Pending {
		t.Error("the snapshot was not answered early")
	}
	list, err := r.client.ListSnapshots(testContext(t), id)
	must(t, err)
	if len(list) != 1 || list[0].Name != "s" || !list[0].Date.Equal(first.Date) {
		t.Errorf("listed: %+v", list)
	}
	last := first
	r.eventually("the snapshot is whole", func() bool {
		var err error
		last, err = r.client.CreateSnapshot(testContext(t), id, "s", nil)
		must(t, err)
		return !last.Pending
	})
	if !last.Date.Equal(first.Date) || last.ID != first.ID || last.DiskSize != first.DiskSize {
		t.Errorf("it began as %+v and is %+v", first, last)
	}
	r.wantRecords(id)

	// What comes meanwhile waits for its turn.
	_, err = r.client.CreateSnapshot(testContext(t), id, "t", nil)
	must(t, err)
	must(t, r.client.DeleteSnapshot(testContext(t), id, "t"))
	must(t, r.client.DeleteSnapshot(testContext(t), id, "s"))
	list, err = r.client.ListSnapshots(testContext(t), id)
	must(t, err)
	if len(list) > 0 {
		t.Errorf("listed after their deletion: %+v", list)
	}
	r.wantRecords(id)
}

// A snapshot that was promised and is lost with its worker is never taken again, of another instant, under the same
// name, until it has been deleted.
func TestLostSnapshot(t *testing.T) {
	r := newRig(t)
	r.inProcess(hooks{answerAfter: time.Nanosecond})
	id := r.largeVolume()
	lost := ""
	for i := 0; lost == "" && i < 10; i++ { // it may be whole before the kill
		name := fmt.Sprintf("s%d", i)
		_, err := r.client.CreateSnapshot(testContext(t), id, name, nil)
		must(t, err)
		pid := r.find(id).WorkerPID
		must(t, unix.Kill(pid, unix.SIGKILL))
		r.awaitReplaced(id, pid)
		if _, err = r.client.CreateSnapshot(testContext(t), id, name, nil); errors.Is(err, ErrLost) {
			lost = name
		} else {
			must(t, err)
		}
	}
	if lost == "" {
		t.Fatal("each snapshot was whole before its worker was killed")
	}
	r.wantRecords(id, lost)
	r.detach(id)
	r.attach(id)
	_, err := r.client.CreateSnapshot(testContext(t), id, lost, nil)
	wantErr(t, err, ErrLost)
	list, err := r.client.ListSnapshots(testContext(t), id)
	must(t, err)
	if slices.ContainsFunc(list, func(s Snapshot) bool { return s.Name == lost }) {
		t.Errorf("the lost one is listed: %+v", list)
	}
	must(t, r.client.DeleteSnapshot(testContext(t), id, lost))
	r.wantRecords(id)
	_, err = r.client.CreateSnapshot(testContext(t), id, lost, nil)
	must(t, err)
}

// wantRecords fails unless the pool has records of just these pending snapshots.
func (r *rig) wantRecords(id string, names ...string) {
	r.t.Helper()
	all, err := r.pool.PendingSnapshots(id)
	must(r.t, err)
	var got []string
	for _, s := range all {
		got = append(got, s.Name)
	}
	if !slices.Equal(got, names) {
		r.t.Errorf("pending snapshots %v, want %v", got, names)
	}
}
