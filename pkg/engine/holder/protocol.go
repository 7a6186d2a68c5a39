package holder

import (
	"encoding/json"
	"errors"
	"io"
	"net"

	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/internal/unixsocket"
)

// Operations of a request.
const (
	opHold  = "hold"  // keep the descriptors under a name that is free
	opGet   = "get"   // copies of a name's descriptors
	opDrop  = "drop"  // forget a name, if it is there
	opList  = "list"  // the names
	opGuard = "guard" // the connection is a guard as long as it is open
	// opSucceed has no reply until the holder leaves: then one message for each entry, one with Done, and the successor
	// answers with a message of its own when it has all of them.
	opSucceed = "succeed"
)

// message is a request or a reply. Descriptors travel beside it.
type message struct {
	Op    string   `json:"op,omitempty"`
	Name  string   `json:"name,omitempty"`
	State []byte   `json:"state,omitempty"`
	Last  bool     `json:"last,omitempty"` // see Entry; a holder of before that does not know it
	Names []string `json:"names,omitempty"`
	Done  bool     `json:"done,omitempty"`
	Error string   `json:"error,omitempty"`
	// Leaving: a successor will answer.
	Leaving bool `json:"leaving,omitempty"`
}

const (
	maxMessage = 128 << 10 // the names of a thousand volumes
	maxFDs     = 16
)

func send(c *net.UnixConn, m message, fds []int) error {
	b, err := json.Marshal(m)
	if err != nil {
		return err
	}
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	_, _, err = c.WriteMsgUnix(b, rights, nil)
	return err
}

// receive returns the next message and the descriptors that came with it, which are the caller's. io.EOF at the end.
func receive(c *net.UnixConn) (m message, fds []int, err error) {
	b, rights := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*maxFDs))
	n, rn, flags, _, err := c.ReadMsgUnix(b, rights)
	if err != nil {
		return m, nil, err
	}
	fds, err = unixsocket.Descriptors(rights[:rn])
	switch {
	case err != nil:
	case n == 0 && rn == 0:
		err = io.EOF
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		err = errors.New("message is too long")
	default:
		err = json.Unmarshal(b[:n], &m)
	}
	if err != nil {
		Entry{FDs: fds}.Close()
		return m, nil, err
	}
	return m, fds, nil
}
