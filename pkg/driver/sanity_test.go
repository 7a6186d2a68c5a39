package driver

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
)

// TestSanity runs the whole of csi-sanity against the plugin, a real engine and real devices.
func TestSanity(t *testing.T) {
	r := newRig(t)
	config := sanity.NewTestConfig()
	config.Address = strings.TrimPrefix(r.endpoint("csi.sock"), "unix://")
	config.TargetPath = filepath.Join(r.base, "target")
	config.StagingPath = filepath.Join(r.base, "staging")
	config.TestVolumeSize = gib
	config.TestVolumeParameters = map[string]string{
		"clusterSize": "64K", "csi.storage.k8s.io/pv/name": "pv",
		"fsType": "xfs", // which root may grow while it is mounted, also without CAP_SYS_RESOURCE
	}

	passed, skipped := 0, map[string]int{}
	ginkgo.ReportAfterEach(func(report ginkgo.SpecReport) {
		switch report.State {
		case types.SpecStatePassed:
			passed++
		case types.SpecStateSkipped:
			skipped[report.Failure.Message]++
		default:
		}
	})
	context := sanity.GinkgoTest(&config)
	defer context.Finalize()
	gomega.RegisterFailHandler(ginkgo.Fail)
	suite, reporter := ginkgo.GinkgoConfiguration()
	reporter.Succinct = true
	ginkgo.RunSpecs(t, "csi-sanity", suite, reporter)

	total := 0
	for reason, n := range skipped {
		total += n
		if !undeclared()[reason] {
			t.Errorf("%d tests were skipped because: %s", n, reason)
		}
	}
	reportSanity(t, fmt.Sprintf("csi-sanity: %d passed, %d skipped: their capabilities are not declared", passed, total))
}

// reportSanity prints the count where people see it: go test hides what a test prints when it passes.
func reportSanity(t *testing.T, line string) {
	t.Helper()
	t.Log(line)
	if file := os.Getenv("CSI_SANITY_REPORT"); file != "" {
		must(t, os.WriteFile(file, []byte(line+"\n"), 0o600))
	}
}

// undeclared are the reasons to skip a test that are no fault of ours: capabilities that the driver does not
// declare.
func undeclared() map[string]bool {
	return map[string]bool{
		"ControllerPublishVolume not supported":             true,
		"ControllerUnpublishVolume not supported":           true,
		"Controller Publish, UnpublishVolume not supported": true,
		"ControllerExpandVolume not supported":              true,
		"ControllerModifyVolume not supported":              true,
		"Modify volume not supported":                       true,
		"Modify Volume not supported":                       true,
		"ControllerGetVolumeHealth not supported":           true,
		"ControllerListVolumeHealth not supported":          true,
		"NodeGetVolumeHealth not supported":                 true,
		"NodeGetStorageHealth not supported":                true,
		"GroupControllerService not supported":              true,
	}
}
