package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
	"k8s.io/klog/v2"
)

const (
	metricsConnections = 32               // at once
	metricsTime        = 30 * time.Second // of one request, from its connection on
	metricsRetry       = 5 * time.Second  // between attempts to have the address
)

// metricsServer serves metrics to Prometheus, if it is told where.
type metricsServer struct{ address string }

func (m *metricsServer) addFlag(cmd *cobra.Command) {
	cmd.Flags().StringVar(&m.address, "metrics", "", "`address` to serve Prometheus at, HOST:PORT, under /metrics; empty: none")
}

// run calls serve with a registry, whose metrics are served until it returns, or nil. What goes wrong with the metrics is
// logged and tried again: serve, which pods depend on, goes on.
func (m *metricsServer) run(ctx context.Context, serve func(prometheus.Registerer) error) error {
	if m.address == "" {
		return serve(nil)
	}
	if _, port, err := net.SplitHostPort(m.address); err != nil {
		return fmt.Errorf("serve metrics: %w", err)
	} else if _, err := net.DefaultResolver.LookupPort(ctx, "tcp", port); err != nil {
		return fmt.Errorf("serve metrics: %w", err)
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	// It does not end with ctx, of which serve may need long to see the end.
	listening, stop := context.WithCancel(context.WithoutCancel(ctx))
	var server sync.WaitGroup
	server.Go(func() { m.keepServing(listening, registry) })
	defer server.Wait()
	defer stop()
	return serve(registry)
}

func (m *metricsServer) keepServing(ctx context.Context, registry *prometheus.Registry) {
	retry := time.NewTicker(metricsRetry)
	defer retry.Stop()
	for {
		if err := m.serve(ctx, registry); ctx.Err() == nil {
			klog.ErrorS(err, "Metrics are not served. All else goes on, and this is tried again", "address", m.address)
		}
		select {
		case <-ctx.Done():
			return
		case <-retry.C:
		}
	}
}

// serve serves until ctx ends.
func (m *metricsServer) serve(ctx context.Context, registry *prometheus.Registry) error {
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", m.address)
	if err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{MaxRequestsInFlight: metricsConnections}))
	server := &http.Server{
		Handler: mux, ReadTimeout: metricsTime, WriteTimeout: metricsTime, MaxHeaderBytes: 16 << 10,
	}
	server.SetKeepAlivesEnabled(false)
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	return server.Serve(&boundedListener{Listener: listener})
}

// boundedListener has metricsConnections open at most: the oldest is closed for a new one. So whoever holds many open keeps
// nobody out.
type boundedListener struct {
	net.Listener
	mu   sync.Mutex
	open []*boundedConn // in the order of Accept, guarded by mu
}

type boundedConn struct {
	net.Conn
	of *boundedListener
}

func (l *boundedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	accepted := &boundedConn{c, l}
	l.mu.Lock()
	l.open = append(l.open, accepted)
	var oldest *boundedConn
	if len(l.open) > metricsConnections {
		oldest = l.open[0]
	}
	l.mu.Unlock()
	if oldest != nil {
		_ = oldest.Close()
	}
	return accepted, nil
}

func (c *boundedConn) Close() error {
	c.of.mu.Lock()
	c.of.open = slices.DeleteFunc(c.of.open, func(other *boundedConn) bool { return other == c })
	c.of.mu.Unlock()
	return c.Conn.Close()
}
