package driver

import (
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// killAll kills the engine and the workers of some volumes, and waits until they are dead.
func (r *rig) killAll(volumes ...*testVolume) {
	r.t.Helper()
	var pids []int
	for _, v := range volumes {
		pids = append(pids, r.workerPID(v.id))
	}
	must(r.t, r.engine.cmd.Process.Signal(unix.SIGSTOP))
	for _, pid := range pids {
		must(r.t, unix.Kill(pid, unix.SIGKILL))
	}
	r.engine.kill()
	p, err := pool.Open(r.dir)
	must(r.t, err)
	for _, v := range volumes {
		eventually(r.t, "the worker is dead", func() bool {
			lease, err := p.Lock(v.id)
			if err == nil {
				must(r.t, lease.Unlock())
			}
			return err == nil
		})
	}
}

// TestHostileTenantBetweenEngines: what a tenant does while nobody serves its device is undone by the next engine, if a holder
// has kept it.
func TestHostileTenantBetweenEngines(t *testing.T) {
	r := newIdleRig(t)
	initPool(t, r.dir)
	r.holder = r.endpoint("holder.sock")[len("unix://"):]
	holder := startProcess(t, "holder", r.holder)
	t.Cleanup(holder.terminate)
	r.startEngine()
	r.startPlugin(Options{})
	a, b := r.create("a", 16*mib, blockCapability(writer)), r.create("b", 16*mib, blockCapability(writer))
	a.publish("pod")
	p := a.enter("pod")
	p.do("write 161")
	before := a.device().Device
	for _, what := range []string{"status offset", "clear"} {
		if got := p.do(what); got != "ok" {
			t.Fatalf("%s: %s", what, got)
		}
		p.do("close")
		r.killAll(a)
		p.do("open") // and nobody answers
		if got := p.do("clear"); got != "ok" {
			t.Fatalf("clear: %s", got)
		}
		p.do("close")
		r.startEngine()
		eventually(t, "the volume is served", func() bool { return a.device().State == engine.Served })
		b.publish("pod")
		if now := a.device().Device; now != before || now == b.device().Device {
			t.Fatalf("%s: it was %s, and is %s; the other one is %s", what, before, now, b.device().Device)
		}
		r.awaitReasons(a.id)
		a.wantClean()
		p.do("open")
		if got := p.do("read"); got != mine {
			t.Errorf("%s: reads %q", what, got)
		}
		b.unstage("pod")
	}
	p.leave()
	a.unstage("pod")
	a.delete()
	b.delete()
	r.wantEmpty()
}

// TestHostileTenantOfDeadDevice: a number does not go to another volume though everything has died that kept the device bound.
func TestHostileTenantOfDeadDevice(t *testing.T) {
	r := newRig(t) // the engine is its own holder
	a, b := r.create("a", 16*mib, blockCapability(writer)), r.create("b", 16*mib, blockCapability(writer))
	a.publish("pod")
	p := a.enter("pod")
	p.do("write 161")
	before := a.device().Device
	r.killAll(a)
	p.do("clear")
	p.do("close") // it is unbound
	r.startEngine()
	b.publish("pod")
	q := b.enter("pod")
	q.do("write 195")
	const theirs = all65536 + "0xc3" // no other test's: the number may go to a program of another engine, so nothing is written to it
	if b.device().Device == before {
		t.Fatalf("another volume is %s now", before)
	}
	r.awaitReasons(a.id, "VolumeFailed")
	wantCode(t, 9)(r.NodePublishVolume(t.Context(), a.publishRequest("pod"))) // FAILED_PRECONDITION
	p.do("open")
	if got := p.do("read"); got == theirs {
		t.Error("it reads what another tenant has written")
	}
	if got := q.do("read"); got != theirs {
		t.Errorf("the other tenant reads %q", got)
	}
	ok[*csi.NodeStageVolumeResponse](t)(r.NodeStageVolume(t.Context(), a.stageRequest()))
	if now := a.device().Device; now == b.device().Device {
		t.Fatalf("both are %s", now)
	}
	ok[*csi.NodePublishVolumeResponse](t)(r.NodePublishVolume(t.Context(), a.publishRequest("pod")))
	next := a.enter("pod")
	if got := next.do("read"); got != mine {
		t.Errorf("the next pod reads %q", got)
	}
	for _, one := range []*tenant{p, q, next} {
		one.leave()
	}
	a.unstage("pod")
	b.unstage("pod")
	a.delete()
	b.delete()
	r.wantEmpty()
}
