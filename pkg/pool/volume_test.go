package pool

import (
	"errors"
	"testing"
)

func TestVolumeLife(t *testing.T) {
	p := newPool(t)
	id := create(t, p, "pvc-1")
	v, err := p.Volume(id)
	must(t, err)
	if v.ID != id || v.Name != "pvc-1" || v.Size != testSize || v.Parameters["clusterSize"] != "65536" || v.Created.IsZero() {
		t.Errorf("the volume is %+v", v)
	}
	if found, err := p.FindByName("pvc-1"); found.ID != id || err != nil {
		t.Errorf("FindByName = %v, %v", found.ID, err)
	}
	runTool(t, "qemu-img", "check", p.ImagePath(id))

	l := lock(t, p, id)
	img, err := l.Open(false)
	must(t, err)
	if img.Size() != testSize {
		t.Errorf("the image has %d bytes", img.Size())
	}
	if err := l.Remove(); !errors.Is(err, ErrInUse) {
		t.Errorf("removing a volume whose image is open: %v, want ErrInUse", err)
	}
	_, err = img.CreateSnapshot("first", nil)
	must(t, err, img.Close())
	if _, err := p.Snapshots(id); !errors.Is(err, ErrInUse) {
		t.Errorf("snapshots of a leased volume: %v, want ErrInUse", err)
	}
	must(t, l.Unlock())
	if s, err := p.Snapshots(id); err != nil || len(s) != 1 || s[0].Name != "first" {
		t.Errorf("snapshots: %v, %v", s, err)
	}

	l = lock(t, p, id)
	must(t, l.Remove(), l.Unlock())
	if _, err := p.Volume(id); !errors.Is(err, ErrNotFound) {
		t.Errorf("a removed volume: %v, want ErrNotFound", err)
	}
	if got := tree(t, p.Dir()); len(got) != 4 {
		t.Errorf("an empty pool holds %v", got)
	}
}
