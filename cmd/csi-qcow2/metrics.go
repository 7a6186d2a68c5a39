package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/spf13/cobra"
)

// metricsServer serves metrics to Prometheus, if it is told where.
type metricsServer struct{ address string }

func (m *metricsServer) addFlag(cmd *cobra.Command) {
	cmd.Flags().StringVar(&m.address, "metrics", "", "`address` to serve Prometheus at, HOST:PORT, under /metrics; empty: none")
}

// run calls serve with a registry, whose metrics are served until it returns, or nil.
func (m *metricsServer) run(ctx context.Context, serve func(prometheus.Registerer) error) error {
	if m.address == "" {
		return serve(nil)
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", m.address)
	if err != nil {
		return fmt.Errorf("serve metrics: %w", err)
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second}
	ended := make(chan error, 1)
	go func() { ended <- server.Serve(listener) }()
	err = serve(registry)
	closeErr := server.Close()
	if served := <-ended; !errors.Is(served, http.ErrServerClosed) {
		closeErr = errors.Join(closeErr, served)
	}
	return errors.Join(err, closeErr)
}
