package worker

import (
	"net"
	"sync"
)

// oneConn is a listener with one connection, that exists already. It ends when the connection does.
type oneConn struct {
	conn  net.Conn
	first sync.Once
	ended chan struct{}
}

func newOneConn(c net.Conn) *oneConn { return &oneConn{conn: c, ended: make(chan struct{})} }

func (l *oneConn) Accept() (c net.Conn, err error) {
	l.first.Do(func() { c = &endingConn{Conn: l.conn, ended: l.ended} })
	if c != nil {
		return c, nil
	}
	<-l.ended
	return nil, net.ErrClosed
}

func (l *oneConn) Close() error   { return l.conn.Close() }
func (l *oneConn) Addr() net.Addr { return l.conn.LocalAddr() }

// endingConn closes ended when it is closed.
type endingConn struct {
	net.Conn
	once  sync.Once
	ended chan struct{}
}

func (c *endingConn) Close() error {
	c.once.Do(func() { close(c.ended) })
	return c.Conn.Close()
}
