package unixsocket

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A socket is root's, and takes the place of one that nobody listens at, and of nothing else.
func TestListen(t *testing.T) {
	for _, network := range []string{"unix", "unixpacket"} {
		t.Run(network, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "sock")
			stale, err := net.ListenUnix(network, &net.UnixAddr{Name: path, Net: network})
			must(t, err)
			stale.SetUnlinkOnClose(false)
			must(t, stale.Close())

			l, err := Listen(t.Context(), network, path)
			must(t, err)
			info, err := os.Stat(path)
			must(t, err)
			if info.Mode() != os.ModeSocket|0o600 {
				t.Errorf("mode %v", info.Mode())
			}
			if _, err := Listen(t.Context(), network, path); !errors.Is(err, ErrTaken) {
				t.Errorf("a second listener: %v", err)
			}
			must(t, l.Close())
			if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the file of a closed socket: %v", err)
			}
			must(t, os.WriteFile(path, []byte("data"), 0o600))
			if _, err := Listen(t.Context(), network, path); !errors.Is(err, ErrTaken) {
				t.Errorf("in the place of a file: %v", err)
			}
			if b, err := os.ReadFile(path); err != nil || string(b) != "data" {
				t.Errorf("the file has %q: %v", b, err)
			}
		})
	}
}

func TestDescriptors(t *testing.T) {
	ours, theirs, err := Pair(unix.SOCK_SEQPACKET)
	must(t, err)
	defer ours.Close()
	defer theirs.Close()
	r, w, err := os.Pipe()
	must(t, err)
	defer r.Close()
	defer w.Close()
	must(t, unix.Sendmsg(int(theirs.Fd()), []byte("x"), unix.UnixRights(int(r.Fd()), int(w.Fd())), nil, 0))
	control := make([]byte, unix.CmsgSpace(8))
	_, n, _, _, err := ours.ReadMsgUnix(make([]byte, 1), control)
	must(t, err)
	fds, err := Descriptors(control[:n])
	must(t, err)
	if len(fds) != 2 {
		t.Fatalf("%d descriptors came", len(fds))
	}
	var files []*os.File
	for i, fd := range fds {
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		must(t, err)
		if flags&unix.FD_CLOEXEC == 0 {
			t.Errorf("descriptor %d outlives an exec", i)
		}
		files = append(files, os.NewFile(uintptr(fd), "passed"))
		t.Cleanup(func() { files[i].Close() })
	}
	_, err = files[1].WriteString("y")
	must(t, err)
	got := make([]byte, 1)
	_, err = r.Read(got)
	must(t, err)
	if string(got) != "y" {
		t.Errorf("%q came through the copy", got)
	}
	if fds, err := Descriptors(nil); len(fds) != 0 || err != nil {
		t.Errorf("of no control message: %v, %v", fds, err)
	}
}
