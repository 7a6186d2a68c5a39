package main

import (
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func TestMetricsServer(t *testing.T) {
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := metricsServer{address: free.Addr().String()}
	free.Close()
	err = m.run(t.Context(), func(r prometheus.Registerer) error {
		g := prometheus.NewGauge(prometheus.GaugeOpts{Name: "answer"})
		r.MustRegister(g)
		g.Set(42)
		resp, err := http.Get("http://" + m.address + "/metrics")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if !strings.Contains(string(body), "\nanswer 42\n") {
			t.Errorf("served: %s", body)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	off := metricsServer{}
	err = off.run(t.Context(), func(r prometheus.Registerer) error {
		if r != nil {
			t.Error("metrics are collected and not served")
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	m.address = "127.0.0.1:none"
	if err := m.run(t.Context(), nil); err == nil {
		t.Error("an impossible address was taken")
	}
}
