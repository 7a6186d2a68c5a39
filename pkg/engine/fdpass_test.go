package engine

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/helper"
)

func openDir(t *testing.T) *os.File {
	t.Helper()
	dir, err := os.Open(t.TempDir())
	must(t, err)
	t.Cleanup(func() { dir.Close() })
	return dir
}

// startFDServer serves a store's socket, and returns a client of it.
func startFDServer(t *testing.T, s *fdStore) *Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sock")
	l, err := listen(t.Context(), "unixpacket", path+fdSocketSuffix)
	must(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.serve(l)
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
		s.closeAll()
	})
	return &Client{path: path}
}

func TestPassFD(t *testing.T) {
	s := newFDStore(time.Hour)
	c := startFDServer(t, s)
	dir := openDir(t)
	must(t, c.PassFD(t.Context(), "token", dir))
	wantErr(t, c.PassFD(t.Context(), "token", dir), ErrFreeze) // the token is taken
	wantErr(t, c.PassFD(t.Context(), strings.Repeat("x", maxTokenLen+1), dir), ErrFreeze)

	got, err := s.take("token")
	must(t, err)
	defer got.End()
	at, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", got.PID, helper.DirFD))
	must(t, err)
	if at != dir.Name() {
		t.Errorf("%s arrived instead of %s", at, dir.Name())
	}
	_, err = s.take("token") // once
	wantErr(t, err, ErrFreeze)

	file, err := os.Create(filepath.Join(dir.Name(), "file"))
	must(t, err)
	defer file.Close()
	wantErr(t, c.PassFD(t.Context(), "file", file), ErrFreeze)
}

func TestPassFDWithoutFD(t *testing.T) {
	s := newFDStore(time.Hour)
	c := startFDServer(t, s)
	conn, err := net.Dial("unixpacket", c.path+fdSocketSuffix)
	must(t, err)
	defer conn.Close()
	_, err = conn.Write([]byte("token"))
	must(t, err)
	reply := make([]byte, 100)
	n, err := conn.Read(reply)
	must(t, err)
	if n <= 1 {
		t.Error("accepted")
	}
}

func TestPassFDToNobody(t *testing.T) {
	c := &Client{path: filepath.Join(t.TempDir(), "sock")}
	wantErr(t, c.PassFD(t.Context(), "token", openDir(t)), ErrUnavailable)
}

func TestTokensAreBounded(t *testing.T) {
	s := newFDStore(time.Hour)
	defer s.closeAll()
	h := startTestHelper(t)
	for i := range maxTokens {
		must(t, s.put(fmt.Sprint(i), h))
	}
	if s.put("one more", h) == nil {
		t.Error("accepted one more")
	}
}

// What nobody takes keeps no file system busy for long.
func TestTokensExpire(t *testing.T) {
	s := newFDStore(time.Millisecond)
	h := startTestHelper(t)
	must(t, s.put("token", h))
	<-h.Done
	must(t, h.Exit)
	_, err := s.take("token")
	wantErr(t, err, ErrFreeze)
}

func startTestHelper(t *testing.T) *helper.Helper {
	t.Helper()
	h, err := helper.Start(openDir(t))
	must(t, err)
	t.Cleanup(func() {
		h.End()
		<-h.Done
	})
	return h
}
