package e2e

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"testing"

	core "k8s.io/api/core/v1"
)

// A virtual machine whose disk is a raw block volume writes while the volume is snapshotted. Another one boots from what
// is restored of it, and finds what the first had flushed.
func TestVirtualMachine(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	c := claim{class: "csi-qcow2-block", block: true}
	s.pvc("disk", c)
	writer := s.machine("writer", "disk", "dd if=/guest.img of=/dev/disk bs=1M conv=fsync")
	if found := writer.says("found", 0); found != 0 {
		t.Errorf("a new disk has %d records", found)
	}
	before := writer.says("wrote", 10)
	s.snapshot("snap", "disk")
	after := writer.says("wrote", before)
	writer.says("wrote", after+10) // it goes on

	c.source = fromSnapshot("snap")
	s.pvc("restored", c)
	reader := s.machine("reader", "restored", "true")
	if found := reader.says("found", 0); found < before || found > after+1 {
		t.Errorf("the restored disk has %d records, want %d to %d", found, before, after+1)
	}
	reader.says("wrote", after+10)
}

// A guest is a virtual machine in a pod. Its console is the pod's log.
type guest struct {
	*space
	pod string
}

// machine starts a guest on a block volume, after a command that may prepare it.
func (s *space) machine(pod, disk, prepare string) guest {
	s.Helper()
	s.pod(pod, func(p *core.Pod) {
		c := &p.Spec.Containers[0]
		c.Image = "localhost/vm:e2e"
		c.Command = []string{"/bin/sh", "-ec", prepare + "; exec qemu-system-x86_64 -accel tcg -m 192 -nodefaults " +
			"-display none -serial stdio -no-reboot -drive file=/dev/" + disk + ",format=raw,if=virtio,cache=none,discard=unmap"}
	}, disk)
	return guest{s, pod}
}

var guestLine = regexp.MustCompile(`guest: (\w+) (\d+)\r?\n`)

// says waits until a guest says that it found, or wrote, at least so many records, and returns how many. A guest that has
// anything else to say has found damage.
func (g guest) says(what string, least int) (records int) {
	g.Helper()
	g.eventually(fmt.Sprintf("guest %s, that it %s %d records", g.pod, what, least), func(ctx context.Context) error {
		log, err := client.CoreV1().Pods(g.name).GetLogs(g.pod, &core.PodLogOptions{}).DoRaw(ctx)
		if err != nil {
			return err
		}
		records = -1
		for _, line := range guestLine.FindAllSubmatch(log, -1) {
			switch word := string(line[1]); word {
			case what:
				if records, err = strconv.Atoi(string(line[2])); err != nil {
					return err
				}
			case "found", "wrote":
			default:
				g.Fatalf("guest %s: %s", g.pod, log)
			}
		}
		if records < least {
			return fmt.Errorf("the last is %d: %s", records, log[max(0, len(log)-1000):])
		}
		return nil
	})
	return records
}
