package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// Pods write, one with many requests at once, while the engine of their node is deleted and killed, and a worker has no
// memory left: they see no error.
func TestEngineDeath(t *testing.T) {
	s := newSpace(t)
	node := nodes(s)[0]
	load, d, sum := s.busyPod(on(node))
	volume := s.pv("load").Spec.CSI.VolumeHandle

	for _, c := range []struct {
		what string
		do   func(engine *core.Pod)
	}{
		{"the engine's pod is deleted", func(engine *core.Pod) {
			s.check(client.CoreV1().Pods(system).Delete(s.ctx, engine.Name, meta.DeleteOptions{}))
			s.eventually("another engine", func(ctx context.Context) error {
				_, err := client.CoreV1().Pods(system).Get(ctx, engine.Name, meta.GetOptions{})
				return gone(err)
			})
		}},
		{"its container is killed", func(engine *core.Pod) {
			s.check(kill(s.process(engine.UID, "engine", "--listen")))
			s.eventually("the container to be started again", func(ctx context.Context) error {
				now, err := client.CoreV1().Pods(system).Get(ctx, engine.Name, meta.GetOptions{})
				if err == nil && now.Status.ContainerStatuses[0].RestartCount == engine.Status.ContainerStatuses[0].RestartCount {
					err = errors.New("it was not")
				}
				return err
			})
		}},
		{"a worker has no memory left", func(engine *core.Pod) {
			worker := s.process(engine.UID, "worker", volume)
			killed := s.starve(worker)
			s.snapshot("starving", "load") // needs some
			s.eventually("the worker to be killed", func(context.Context) error { return killed() })
		}},
	} {
		name := s.driverPod("engine", node)
		engine, err := client.CoreV1().Pods(system).Get(s.ctx, name, meta.GetOptions{})
		s.check(err)
		before := d.appended()
		c.do(engine)
		s.driverPod("engine", node)
		s.eventually("the pod to write after "+c.what, func(context.Context) error {
			if now := d.appended(); now <= before+10 {
				return fmt.Errorf("%d records, %d before", now, before)
			}
			return nil
		})
	}
	load.stopLoad()
	after := d.appended()
	d.stopAppending()
	d.verify(sum, after, d.appended())
}

// process waits for the process of a driver's pod whose command line has all words, and returns its number on this machine.
func (s *space) process(pod types.UID, words ...string) (pid int) {
	s.Helper()
	s.eventually(fmt.Sprint("a process with ", words), func(context.Context) error {
		all, err := filepath.Glob("/proc/[0-9]*")
		if err != nil {
			return err
		}
		for _, dir := range all {
			groups, _ := os.ReadFile(dir + "/cgroup") // it may have ended
			line, _ := os.ReadFile(dir + "/cmdline")
			found := strings.Contains(string(groups), string(pod))
			for _, w := range words {
				found = found && strings.Contains(string(line), w)
			}
			if found {
				pid, err = strconv.Atoi(filepath.Base(dir))
				return err
			}
		}
		return errors.New("there is none")
	})
	return pid
}

func kill(pid int) error {
	p, err := os.FindProcess(pid)
	if err == nil {
		err = p.Kill()
	}
	return err
}

// starve moves a process to a cgroup that gets no more memory: when it needs some the kernel kills it. killed tells whether
// that has happened.
func (s *space) starve(pid int) (killed func() error) {
	s.Helper()
	dir, limit, events := "/sys/fs/cgroup/q2e-starve", "memory.max", "memory.events"
	if _, err := os.Stat("/sys/fs/cgroup/memory"); err == nil { // version 1
		dir, limit, events = "/sys/fs/cgroup/memory/q2e-starve", "memory.limit_in_bytes", "memory.oom_control"
	}
	s.check(os.Mkdir(dir, 0o700))
	s.Cleanup(func() { s.check(os.Remove(dir)) })
	write := func(path, text string) { s.check(os.WriteFile(path, []byte(text), 0o600)) }
	write(fmt.Sprintf("/proc/%d/oom_score_adj", pid), "0") // where the engine may, it has spared it
	write(filepath.Join(dir, limit), "65536")
	write(filepath.Join(dir, "cgroup.procs"), strconv.Itoa(pid))
	return func() error {
		b, err := os.ReadFile(filepath.Join(dir, events))
		if err == nil && !strings.Contains(string(b), "oom_kill 1\n") {
			err = fmt.Errorf("it was not: %s", b)
		}
		return err
	}
}
