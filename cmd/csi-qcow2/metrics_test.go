package main

import (
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// freeAddress returns one that was free a moment ago.
func freeAddress(t *testing.T) string {
	t.Helper()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer free.Close()
	return free.Addr().String()
}

// scrape waits until metrics are served, and returns them.
func scrape(t *testing.T, address string) string {
	t.Helper()
	client := http.Client{Timeout: time.Minute}
	for deadline := time.Now().Add(time.Minute); ; <-time.After(10 * time.Millisecond) {
		resp, err := client.Get("http://" + address + "/metrics")
		if err == nil {
			body, err := io.ReadAll(resp.Body)
			if err = errors.Join(err, resp.Body.Close()); err != nil {
				t.Error(err)
			}
			return string(body)
		}
		if time.Now().After(deadline) {
			t.Error(err)
			return ""
		}
	}
}

func serveMetrics(t *testing.T, address string, fn func(prometheus.Registerer) error) {
	t.Helper()
	m := metricsServer{address: address}
	if err := m.run(t.Context(), fn); err != nil {
		t.Error(err)
	}
}

func TestMetricsServer(t *testing.T) {
	address := freeAddress(t)
	serveMetrics(t, address, func(r prometheus.Registerer) error {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: "answer"})
		r.MustRegister(g)
		g.Set(42)
		if body := scrape(t, address); !strings.Contains(body, "\nanswer 42\n") {
			t.Errorf("served: %s", body)
		}
		return nil
	})
	if c, err := net.Dial("tcp", address); err == nil {
		c.Close()
		t.Error("metrics are served when all has ended")
	}
	serveMetrics(t, "", func(r prometheus.Registerer) error {
		if r != nil {
			t.Error("metrics are collected and not served")
		}
		return nil
	})
	for _, impossible := range []string{"127.0.0.1:none", "127.0.0.1", ":70000"} {
		m := metricsServer{address: impossible}
		if err := m.run(t.Context(), nil); err == nil {
			t.Errorf("%s was taken", impossible)
		}
	}
}

// An address that another program has keeps nobody from his work, and is taken when it is free.
func TestMetricsAddressInUse(t *testing.T) {
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := errors.New("what serve returned")
	m := metricsServer{address: other.Addr().String()}
	err = m.run(t.Context(), func(prometheus.Registerer) error {
		other.Close()
		if body := scrape(t, m.address); !strings.Contains(body, "go_goroutines") {
			t.Errorf("served: %s", body)
		}
		return served
	})
	if !errors.Is(err, served) {
		t.Errorf("run returned %v", err)
	}
}

// Whoever holds open many connections keeps nobody else from being answered.
func TestManyMetricsConnections(t *testing.T) {
	address := freeAddress(t)
	serveMetrics(t, address, func(prometheus.Registerer) error {
		scrape(t, address)
		for range 8 * metricsConnections {
			c, err := net.Dial("tcp", address)
			if err != nil {
				return err
			}
			t.Cleanup(func() { c.Close() })
			_, _ = io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: slow") // it may be closed already
		}
		if body := scrape(t, address); !strings.Contains(body, "go_goroutines") {
			t.Errorf("served: %s", body)
		}
		return nil
	})
}

// The oldest of too many connections is closed, and no other.
func TestBoundedListener(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer inner.Close()
	l := &boundedListener{Listener: inner}
	connect := func() (client, server net.Conn) {
		t.Helper()
		client, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { client.Close() })
		if server, err = l.Accept(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { server.Close() })
		return client, server
	}
	var clients, servers []net.Conn
	for range metricsConnections + 1 {
		client, server := connect()
		clients, servers = append(clients, client), append(servers, server)
	}
	_ = clients[0].SetReadDeadline(time.Now().Add(time.Minute))
	if _, err := clients[0].Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("the oldest of %d: %v", len(clients), err)
	}
	servers[5].Close() // makes room
	connect()
	for i, server := range servers {
		if _, err := server.Write([]byte("x")); (err != nil) != (i == 0 || i == 5) {
			t.Errorf("connection %d: %v", i, err)
		}
	}
}
