package driver

import (
	"testing"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
)

// kubelet learns of the driver from GetPluginInfo, which a pool whose disk hangs does not hold up.
func TestPluginInfoWaitsForNoPool(t *testing.T) {
	d := &Driver{poolDir: "/pool", capacity: &capacity{reserve: 1, overcommit: 1.5}}
	d.poolMu.Lock() // as whoever waits for the disk has it
	defer d.poolMu.Unlock()
	answered := make(chan *csi.GetPluginInfoResponse, 1)
	go func() {
		answer, _ := (&identity{Driver: d}).GetPluginInfo(t.Context(), &csi.GetPluginInfoRequest{})
		answered <- answer
	}()
	select {
	case answer := <-answered:
		if m := answer.GetManifest(); m[ManifestPool] != "/pool" || m[ManifestReserve] != "1" || m[ManifestOvercommit] != "1.5" {
			t.Errorf("%q", m)
		}
	case <-time.After(patience):
		t.Error("no answer")
	}
}
