package engine

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// The pool's disk is not mounted: nothing works, nothing is created, and all is well when it comes.
func TestEmptyPoolDirectory(t *testing.T) {
	r := newIdleRig(t)
	ctx := testContext(t)
	r.launch()
	r.awaitProbe(pool.ErrNotReady)
	id := "a-12345678-abcdefgh"
	_, err := r.client.Attach(ctx, id)
	wantErr(t, err, ErrUnavailable)
	wantErr(t, r.client.Detach(ctx, id), ErrUnavailable)
	_, err = r.client.List(ctx)
	wantErr(t, err, ErrUnavailable)
	_, err = r.client.CreateSnapshot(ctx, id, "s", nil)
	wantErr(t, err, ErrUnavailable)
	wantErr(t, r.client.Clone(ctx, id, "", filepath.Join(r.dir, "x"), 0), ErrUnavailable)
	entries, err := os.ReadDir(r.dir)
	must(t, err)
	if len(entries) != 0 {
		t.Fatalf("created in the empty directory: %v", entries)
	}

	must(t, pool.Init(r.dir))
	r.pool, err = pool.Open(r.dir)
	must(t, err)
	r.awaitProbe(nil)
	r.attach(r.newVolume("a", mib))
}

func TestSocketsAreForRootAlone(t *testing.T) {
	r := newRig(t)
	for _, path := range []string{r.socket, r.socket + fdSocketSuffix} {
		info, err := os.Stat(path)
		must(t, err)
		if info.Mode().Perm() != 0o600 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
	}
}

func TestSecondEngineRefuses(t *testing.T) {
	r := newRig(t)
	device := r.attach(r.newVolume("a", mib))
	other := filepath.Join(t.TempDir(), "other.sock")
	wantErr(t, Run(t.Context(), Options{Listen: "unix://" + other, PoolDir: r.dir}), errOtherEngine)
	empty := t.TempDir()
	wantErr(t, Run(t.Context(), Options{Listen: "unix://" + r.socket, PoolDir: empty}), errOtherEngine)
	r.awaitProbe(nil)
	fillDevice(t, device, 0, 4096, 1)
}

func TestBadEndpoint(t *testing.T) {
	for _, endpoint := range []string{"", "/run/x.sock", "unix://x.sock", "tcp://127.0.0.1:1"} {
		_, err := NewClient(endpoint)
		wantErr(t, err, ErrInvalid)
		wantErr(t, Run(t.Context(), Options{Listen: endpoint, PoolDir: t.TempDir()}), ErrInvalid)
	}
}
