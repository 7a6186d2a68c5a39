package blockdev

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Handle is what of a device outlives its server: whoever keeps the descriptors keeps the device. The requests that nobody
// answers wait until another server takes them up with Resume, or until the last descriptor is closed, which ends all of
// them with an error.
type Handle struct {
	// State says what the descriptors are, in a form that other versions understand or refuse.
	State []byte
	// FDs are the FUSE connection, the root of its mount, the served file, and the memory of the journal if there is one.
	FDs []int
	// Loop is a copy of the descriptor that Options.Keep was given; 0: none.
	Loop int
}

// handleState is what State holds, in JSON.
type handleState struct {
	Version int `json:"version"`
	Loop    int `json:"loop"` // number of the loop device
	// What was negotiated with the kernel, which will not be asked again.
	MaxPayload    int  `json:"maxPayload"`
	MaxBackground int  `json:"maxBackground"`
	Resend        bool `json:"resend"`
	// Journal is the version of the journal in the last descriptor; 0: the kernel resends.
	Journal int `json:"journal,omitempty"`
}

const handleVersion = 1

// ErrGone is returned by Resume when the loop device is no longer bound to the handle's file.
var ErrGone = errors.New("device is gone")

// Handle returns the device's handle. The descriptors stay the device's.
func (d *Device) Handle() (Handle, error) {
	c := d.conn
	state := handleState{
		Version: handleVersion, Loop: d.loop.number, MaxPayload: c.payload, MaxBackground: maxBackground, Resend: c.resends,
	}
	fds := []int{c.dev, c.mount, c.file}
	if !c.resends {
		state.Journal = journalVersion
		fds = append(fds, d.server.messages.fd)
	}
	b, err := json.Marshal(state)
	return Handle{State: b, FDs: fds}, err
}

// Close closes the descriptors.
func (h Handle) Close() {
	for _, fd := range h.FDs {
		unix.Close(fd)
	}
	if h.Loop > 0 {
		unix.Close(h.Loop)
	}
}

// Abort ends the device's connection, whoever else has the descriptors: all requests fail, those that wait too.
func (h Handle) Abort() error {
	_, c, err := h.open()
	if err != nil {
		return fmt.Errorf("abort: %w", err)
	}
	return c.abort()
}

// open makes a connection of the descriptors.
func (h Handle) open() (handleState, *connection, error) {
	var s handleState
	if err := json.Unmarshal(h.State, &s); err != nil {
		return s, nil, fmt.Errorf("device handle: %w", err)
	}
	want := 3
	if !s.Resend {
		want++
	}
	if s.Version != handleVersion || len(h.FDs) != want {
		return s, nil, fmt.Errorf("device handle of version %d with %d descriptors", s.Version, len(h.FDs))
	}
	c := &connection{dev: h.FDs[0], mount: h.FDs[1], file: h.FDs[2], payload: s.MaxPayload, resends: s.Resend}
	return s, c, c.identify()
}

// Resume goes on serving a device whose server is dead, or has left it, with a backend of the same content: requests that
// were not answered are answered now. The options are those of Attach. The descriptors are the device's when Resume
// succeeds. ErrGone if there is no such device any more. Call Check soon.
//
// The server before must have ended: what it still did would happen behind what this one does.
func Resume(b Backend, o Options, h Handle) (*Device, error) {
	d, err := resume(b, o, h)
	if err != nil {
		return nil, fmt.Errorf("resume %s: %w", o.Name, err)
	}
	return d, nil
}

func resume(b Backend, o Options, h Handle) (*Device, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	state, c, err := h.open()
	if err != nil {
		return nil, err
	}
	if state.MaxPayload > maxPayload || state.MaxBackground > maxBackground {
		return nil, fmt.Errorf("requests of up to %d bytes were negotiated, up to %d at once", state.MaxPayload, state.MaxBackground)
	}
	if !c.resends && state.Journal != journalVersion {
		return nil, fmt.Errorf("unanswered requests are in a journal of version %d", state.Journal)
	}
	l, err := findBound(state.Loop, o.Name, c)
	if err != nil {
		return nil, err
	}
	ms, err := h.messages()
	if err != nil {
		return nil, err
	}
	c.dev = closeFirst(c.dev)
	h.FDs[0] = c.dev // the caller's, if this fails
	s := newServer(b, o, ms)
	if err := s.takeUp(c); err != nil {
		s.close()
		return nil, err
	}
	if len(h.FDs) > 3 {
		unix.Close(h.FDs[3]) // the server has its own
	}
	l.fd = h.Loop
	return &Device{conn: c, server: s, backend: b, options: o, loop: l, kept: h.Loop > 0}, nil
}

// messages returns the memory of the server's messages: the earlier server's, if that is where unanswered requests are.
func (h Handle) messages() (*messages, error) {
	if len(h.FDs) > 3 {
		return openMessages(h.FDs[3])
	}
	return newMessages(false)
}

// takeUp begins to serve a connection with what an earlier server has not answered.
func (s *server) takeUp(c *connection) error {
	s.conn = c
	if c.resends {
		if err := c.resend(); err != nil {
			return err
		}
	} else if err := s.replay(); err != nil {
		return err
	}
	return s.start(c)
}

// findBound returns loop device number if it is bound to the file of c. It does not open the device, nor ask it: that may have
// to wait for requests that nobody answers yet. A number that was not kept may have been given to somebody who uses the same
// name: Check tells.
func findBound(number int, name string, c *connection) (loopDevice, error) {
	path, err := backingFile(number)
	if err != nil {
		return loopDevice{}, err
	}
	if path != "/"+name {
		return loopDevice{}, ErrGone
	}
	var st unix.Statx_t
	if err := unix.Statx(c.file, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_INO, &st); err != nil {
		return loopDevice{}, fmt.Errorf("stat FUSE file: %w", err)
	}
	return loopDevice{number: number, fileDev: unix.Mkdev(st.Dev_major, st.Dev_minor), fileInode: st.Ino, filePath: path}, nil
}

// resend makes the kernel hand out again what was read from the connection and not answered.
func (c *connection) resend() error {
	var b [outHeaderSize]byte
	putOutHeader(b[:], len(b), 0, 0)
	binary.NativeEndian.PutUint32(b[4:], notifyResend)
	if _, err := unix.Write(c.dev, b[:]); err != nil {
		return fmt.Errorf("ask for unanswered requests: %w", err)
	}
	return nil
}

// Leave stops serving and leaves the device to whoever resumes it: when it returns the backend is no longer called, and
// what waits for an answer goes on waiting. The process must end soon, for its threads still take requests, which only
// then come back.
func (d *Device) Leave() { d.server.leave() }
