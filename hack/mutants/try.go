package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"
)

// suite says how the tests of a package are run: first those that most often notice something, then the rest, then the slow ones.
type suite struct {
	first, slow string // regexps
	race        string // regexp of the tests that the race detector watches, for locks
}

func suiteOf(dir string) suite {
	const none = "^$"
	switch dir {
	case "pkg/qcow2":
		return suite{
			first: "^(TestOrder.*|TestCommit.*|TestClaim.*|TestRedo.*|TestStartDirect|TestSyncs)$", race: "Concurren|Online",
			slow: "^(TestHazardHuge.*|TestCrash|TestCrashOnline|TestFaults|TestDifferential|TestDamage|Fuzz.*|TestKill)$",
		}
	case "pkg/engine":
		return suite{first: none, slow: "Survive|Soak|Load|Fio", race: "."}
	}
	return suite{first: none, slow: none, race: "."}
}

// stages are the arguments of the runs that a mutant must survive.
func (s suite) stages(o *options) [][]string {
	if o.tests != "" {
		return [][]string{{"-test.run", o.tests}}
	}
	all := [][]string{{"-test.run", s.first}, {"-test.skip", s.first + "|" + s.slow}, {"-test.run", s.slow}}
	if o.quick {
		all = all[:2]
	}
	return all
}

// trier builds mutants and runs their packages' tests.
type trier struct {
	tmp   string
	o     *options
	limit map[string]time.Duration // of a run of a package's tests
}

// newTrier runs the tests of each package as it is: they must pass, and say how long they take.
func newTrier(ctx context.Context, ms []mutant, o *options) (*trier, error) {
	tmp, err := os.MkdirTemp("/var/tmp", "q2m.")
	if err != nil {
		return nil, err
	}
	t := &trier{tmp: tmp, o: o, limit: map[string]time.Duration{}}
	for _, m := range ms {
		for _, race := range []bool{false, true} {
			key := t.key(m.dir, race)
			if t.limit[key] > 0 || race && !m.lock {
				continue
			}
			t.limit[key] = time.Hour
			start := time.Now()
			became, err := t.try(ctx, mutant{name: m.dir, dir: m.dir, lock: race})
			if err == nil && became != survived {
				err = fmt.Errorf("%s: the tests fail without any change: %s", m.dir, became)
			}
			if err != nil {
				t.close()
				return nil, err
			}
			// Others may run beside it. A mutant that hangs costs so much.
			t.limit[key] = 3*time.Since(start) + 30*time.Second
			fmt.Printf("%s: its tests take %v\n", key, time.Since(start).Round(time.Second))
		}
	}
	return t, nil
}

func (t *trier) key(dir string, race bool) string {
	if race {
		return dir + ", raced"
	}
	return dir
}

func (t *trier) close() { _ = os.RemoveAll(t.tmp) }

// try returns what becomes of a mutant.
func (t *trier) try(ctx context.Context, m mutant) (string, error) {
	work, err := os.MkdirTemp(t.tmp, "")
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	s := suiteOf(m.dir)
	if m.lock && t.o.tests == "" {
		became, err := t.build(ctx, m, work, true)
		if err != nil || became != "" {
			return became, err
		}
		became, err = t.run(ctx, m, work, true, "-test.run", s.race, "-test.skip", s.slow)
		if err != nil || became != survived || s.race == "." {
			return became, err
		}
	}
	became, err := t.build(ctx, m, work, false)
	if err != nil || became != "" {
		return became, err
	}
	for _, args := range s.stages(t.o) {
		if became, err = t.run(ctx, m, work, false, args...); err != nil || became != survived {
			return became, err
		}
	}
	return survived, nil
}

// build compiles the tests of the mutant's package; it returns invalid if they do not.
func (t *trier) build(ctx context.Context, m mutant, work string, race bool) (string, error) {
	args := []string{"test", "-c", "-o", filepath.Join(work, "test")}
	if race {
		args = append(args, "-race")
	}
	if m.file != "" {
		overlay, err := writeOverlay(m, work)
		if err != nil {
			return "", err
		}
		args = append(args, "-overlay", overlay)
	}
	out, err := exec.CommandContext(ctx, "go", append(args, "./"+m.dir)...).CombinedOutput() //nolint:gosec // the packages that were named
	var exit *exec.ExitError
	switch {
	case err == nil:
		return "", nil
	case errors.As(err, &exit) && m.file != "" && bytes.Contains(out, []byte(filepath.Base(m.file))):
		return invalid, nil
	}
	return "", fmt.Errorf("build: %w\n%s", err, out)
}

func writeOverlay(m mutant, work string) (string, error) {
	mutated, overlay := filepath.Join(work, filepath.Base(m.file)), filepath.Join(work, "overlay.json")
	original, err := filepath.Abs(m.file)
	if err != nil {
		return "", err
	}
	b, err := json.Marshal(map[string]map[string]string{"Replace": {original: mutated}})
	if err != nil {
		return "", err
	}
	return overlay, errors.Join(os.WriteFile(mutated, m.source(), 0o600), os.WriteFile(overlay, b, 0o600))
}

// failedTest finds the first test that failed.
func failedTest(out []byte) string {
	if m := regexp.MustCompile(`(?m)^--- FAIL: (\S+)`).FindSubmatch(out); m != nil {
		return string(m[1])
	}
	for _, sign := range []string{"DATA RACE", "panic: ", "fatal error: "} {
		if i := bytes.Index(out, []byte(sign)); i >= 0 {
			line, _, _ := bytes.Cut(out[i:], []byte("\n"))
			return string(line)
		}
	}
	return "exit status"
}

// run runs tests that were built. Their processes and mounts end with them, in namespaces of their own.
func (t *trier) run(ctx context.Context, m mutant, work string, race bool, args ...string) (string, error) {
	limit := t.limit[t.key(m.dir, race)]
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	command := []string{"--mount", "--pid", "--fork", "--kill-child", "--mount-proc", filepath.Join(work, "test"), "-test.failfast"}
	cmd := exec.CommandContext(limited, "unshare", append(command, args...)...) //nolint:gosec // the tests of this repository
	var out bytes.Buffer
	cmd.Dir, cmd.Stdout, cmd.Stderr = m.dir, &out, &out
	cmd.Env = append(os.Environ(), "TMPDIR="+work)
	cmd.WaitDelay = 10 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	t.detachLeft(ctx, work)
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return "", ctx.Err()
	case limited.Err() != nil:
		return fmt.Sprintf("killed: it hangs (%v)", limit.Round(time.Second)), nil
	case errors.As(err, &exit):
		return "killed: " + failedTest(out.Bytes()), nil
	case err != nil:
		return "", err
	}
	return survived, nil
}

// detachLeft detaches the loop devices of files below work: tests that were killed cannot.
func (t *trier) detachLeft(ctx context.Context, work string) {
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, file := range files {
		if b, err := os.ReadFile(file); err == nil && strings.HasPrefix(string(b), work+"/") {
			_ = exec.CommandContext(ctx, "losetup", "--detach", "/dev/"+strings.Split(file, "/")[3]).Run() //nolint:gosec // a device of our own
		}
	}
}
