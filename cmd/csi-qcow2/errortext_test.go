package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

func TestSentence(t *testing.T) {
	t.Parallel()
	missing := &fs.PathError{Op: "open", Path: "x", Err: fs.ErrNotExist}
	for _, tt := range []struct {
		err  error
		want string
	}{
		{missing, "open x: file does not exist"},
		{fmt.Errorf("open x: %w", missing), "open x: file does not exist"},
		{fmt.Errorf("a: %w", errors.Join(missing, missing)), "a: open x: file does not exist; open x: file does not exist"},
		{errors.Join(missing, missing), "open x: file does not exist"},
		{fmt.Errorf("wait: %w", context.DeadlineExceeded), "wait: it took too long"},
		{errors.New("a\x1b[31mred: \r\x00"), `a\x1b[31mred: \r\x00`},
		{errors.New("rpc error: code = Unavailable desc = busy"), "busy"},
		{errors.New("grüße: ☃"), "grüße: ☃"},
		{
			fmt.Errorf("open x: %w", qcow2.ErrNeedsRepair),
			"open x: the image needs a repair; `csi-qcow2 image check --repair all` tells what is wrong, and mends it",
		},
	} {
		if got := sentence(tt.err); got != tt.want {
			t.Errorf("%q: %q, want %q", tt.err, got, tt.want)
		}
	}
}

// TestErrorsForPeople: what a command says about a mistake names things as they were typed, once, and moves no cursor.
func TestErrorsForPeople(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := dir + "/x\x1b[31m\n.qcow2"
	must(t, os.WriteFile(path, []byte("text"), 0o600))
	for _, args := range [][]string{{"image", "info", path}, {"image", "create", path, "1M"}, {"image", "check", path}, {"image", "export", path, "y"}} {
		r := run(t, args...)
		if r.status == 0 || strings.ContainsAny(r.stderr, "\x1b\r") || strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("%v: %q", args, r.stderr)
		}
	}
	for args, want := range map[string]string{
		"image create y 1M --cluster-size foo":      `csi-qcow2: --cluster-size: "foo" is not a size`,
		"image info y -o xml":                       `csi-qcow2: --output: "xml" is neither table nor json`,
		"image create " + dir + " 1M":               dir + " is there already, and stays as it is: give another name, or remove it\n",
		"engine --listen x --pool y --io-timeout z": `csi-qcow2: --io-timeout: `,
	} {
		if r := run(t, strings.Fields(args)...); !strings.Contains(r.stderr, want) || strings.Contains(r.stderr, "invalid argument") {
			t.Errorf("%s: %q, want %q", args, r.stderr, want)
		}
	}
}
