package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"
)

// What the dashboard shows is what the pods export that the PodMonitor selects.
func TestMonitoring(t *testing.T) {
	t.Parallel()
	s := newSpace(t)
	s.pvc("data", claim{})
	s.pod("writer", nil, "data")
	node := s.ready("writer").Spec.NodeName
	s.snapshot("snap", "data") // some metrics begin with their first event

	exported := s.scrape(node)
	var dashboard any
	s.check(json.Unmarshal(s.shipped("deploy/monitoring/dashboard.json"), &dashboard))
	shown := map[string]bool{}
	for _, query := range queries(dashboard) {
		labels := map[string]bool{"node": true, "le": true} // of the PodMonitor, and of histograms
		for _, use := range metricUse.FindAllStringSubmatch(query, -1) {
			name := use[1]
			shown[name] = true
			if exported[name] == nil {
				t.Errorf("%s: no pod exports %s", query, name)
			}
			maps.Copy(labels, exported[name])
		}
		for _, use := range labelUse.FindAllStringSubmatch(query, -1) {
			for _, label := range strings.Split(use[1]+use[2], ",") {
				if label = strings.TrimSpace(label); !labels[label] {
					t.Errorf("%s: there is no label %q", query, label)
				}
			}
		}
	}
	if len(shown) < 10 {
		t.Errorf("the dashboard shows no more than %v", slices.Sorted(maps.Keys(shown)))
	}
}

var (
	metricUse = regexp.MustCompile(`\b(csi_qcow2_\w+)`)
	// Label names: before an operator in a selector, and in a clause "by".
	labelUse   = regexp.MustCompile(`(\w+)(?:=~|!=|=)"|\bby \(([^)]*)\)`)
	sampleLine = regexp.MustCompile(`(?m)^(csi_qcow2_\w+)(?:\{(.*)\})? \S+$`)
	sampleName = regexp.MustCompile(`(\w+)="`)
)

// queries returns the queries in a dashboard, or in a part of one.
func queries(part any) (found []string) {
	switch part := part.(type) {
	case []any:
		for _, element := range part {
			found = append(found, queries(element)...)
		}
	case map[string]any:
		for name, value := range part {
			text, ok := value.(string)
			if ok && (name == "expr" || name == "query") {
				found = append(found, text)
			}
			found = append(found, queries(value)...)
		}
	}
	return found
}

// scrape returns the metrics that the pods of a node export, with the names of their labels, as the PodMonitor has
// Prometheus do.
func (s *space) scrape(node string) map[string]map[string]bool {
	s.Helper()
	var monitor struct {
		Metadata meta.ObjectMeta `json:"metadata"`
		Spec     struct {
			Selector  meta.LabelSelector `json:"selector"`
			Endpoints []struct {
				Port string `json:"port"`
			} `json:"podMetricsEndpoints"`
		} `json:"spec"`
	}
	s.check(yaml.Unmarshal(s.shipped("deploy/monitoring/podmonitor.yaml"), &monitor))
	pods, err := client.CoreV1().Pods(monitor.Metadata.Namespace).List(s.ctx, meta.ListOptions{
		LabelSelector: meta.FormatLabelSelector(&monitor.Spec.Selector), FieldSelector: "spec.nodeName=" + node,
	})
	s.check(err)
	exported := map[string]map[string]bool{}
	for i := range pods.Items {
		for _, endpoint := range monitor.Spec.Endpoints {
			for _, line := range sampleLine.FindAllStringSubmatch(s.metrics(&pods.Items[i], endpoint.Port), -1) {
				labels := map[string]bool{}
				for _, label := range sampleName.FindAllStringSubmatch(line[2], -1) {
					labels[label[1]] = true
				}
				exported[line[1]] = labels
			}
		}
	}
	return exported
}

// metrics returns what a pod exports at a port with a name, nothing if it has no such port.
func (s *space) metrics(pod *core.Pod, portName string) (text string) {
	s.Helper()
	for _, c := range pod.Spec.Containers {
		for _, port := range c.Ports {
			if port.Name != portName {
				continue
			}
			s.eventually("metrics of "+pod.Name, func(ctx context.Context) error {
				raw, err := client.CoreV1().RESTClient().Get().Namespace(pod.Namespace).Resource("pods").
					Name(fmt.Sprintf("%s:%d", pod.Name, port.ContainerPort)).SubResource("proxy").Suffix("metrics").DoRaw(ctx)
				text += string(raw)
				return err
			})
		}
	}
	return text
}

// shipped returns a file of the repository.
func (s *space) shipped(path string) []byte {
	s.Helper()
	content, err := os.ReadFile("../../" + path)
	s.check(err)
	return content
}
