package driver

import (
	"reflect"
	"testing"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"

	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

func TestVolumeParameters(t *testing.T) {
	for _, c := range []struct {
		in   map[string]string
		want volumeParameters
		code codes.Code
	}{
		{nil, volumeParameters{}, codes.OK},
		{map[string]string{"clusterSize": "65536"}, volumeParameters{clusterSize: 65536}, codes.OK},
		{map[string]string{"clusterSize": "64K"}, volumeParameters{clusterSize: 65536}, codes.OK},
		{map[string]string{"clusterSize": "64KiB"}, volumeParameters{clusterSize: 65536}, codes.OK},
		{map[string]string{"clusterSize": "4k"}, volumeParameters{clusterSize: 4096}, codes.OK},
		{map[string]string{"clusterSize": "2Mi"}, volumeParameters{clusterSize: 2 * mib}, codes.OK},
		{map[string]string{"preallocation": "falloc"}, volumeParameters{preallocation: qcow2.PreallocationFalloc}, codes.OK},
		{map[string]string{"preallocation": "some"}, volumeParameters{}, codes.InvalidArgument},
		{map[string]string{"clusterSize": "2K"}, volumeParameters{}, codes.InvalidArgument},
		{map[string]string{"clusterSize": "512"}, volumeParameters{}, codes.InvalidArgument},
		{map[string]string{"clusterSize": "4M"}, volumeParameters{}, codes.InvalidArgument},
		{map[string]string{"clusterSize": "96K"}, volumeParameters{}, codes.InvalidArgument},
		{map[string]string{"clusterSize": "-64K"}, volumeParameters{}, codes.InvalidArgument},
		{map[string]string{"clusterSize": "9223372036854775807M"}, volumeParameters{}, codes.InvalidArgument},
		{map[string]string{"clusterSize": ""}, volumeParameters{}, codes.InvalidArgument},
		{map[string]string{"csi.storage.k8s.io/fstype": "xfs"}, volumeParameters{fsType: "xfs"}, codes.OK},
		{map[string]string{"fstype": "ext4"}, volumeParameters{fsType: "ext4"}, codes.OK},
		{map[string]string{"fsType": "btrfs"}, volumeParameters{}, codes.InvalidArgument},
		{map[string]string{"csi.storage.k8s.io/pvc/name": "data"}, volumeParameters{}, codes.OK},
		{map[string]string{"compression": "zstd"}, volumeParameters{}, codes.InvalidArgument},
	} {
		got, err := parseVolumeParameters(c.in)
		if codeOrOK(err) != c.code || got != c.want {
			t.Errorf("%v: %+v, %v", c.in, got, err)
		}
	}
}

// Each parameter of a class is kept with the volume, and tells it from one with another.
func TestEachParameter(t *testing.T) {
	values := map[string][2]string{
		paramClusterSize: {"4K", "2M"}, paramPreallocation: {"off", "full"}, paramFSType: {"ext4", "xfs"}, paramSnapshotLimit: {"0%", "200%"},
	}
	if fields := reflect.TypeFor[volumeParameters]().NumField(); len(values) != fields {
		t.Errorf("%d of %d parameters are tried", len(values), fields)
	}
	for key, pair := range values {
		var parsed [2]volumeParameters
		for i, value := range pair {
			p, err := parseVolumeParameters(map[string]string{key: value})
			must(t, err)
			parsed[i], err = p.inherit(pool.Volume{})
			must(t, err)
			if got := recordedParameters(parsed[i].record()); got != parsed[i] {
				t.Errorf("%+v became %+v", parsed[i], got)
			}
		}
		first := pool.Volume{Parameters: parsed[0].record()}
		if !parsed[0].match(first) || parsed[1].match(first) {
			t.Errorf("%s: %+v and %+v are not told from each other", key, parsed[0], parsed[1])
		}
	}
	if got := recordedParameters(nil); got.clusterSize != 65536 {
		t.Errorf("a volume without record: %+v", got)
	}
}

func TestSnapshotParameters(t *testing.T) {
	for _, c := range []struct {
		in     map[string]string
		freeze bool
		code   codes.Code
	}{
		{nil, true, codes.OK},
		{map[string]string{"fsFreeze": "false"}, false, codes.OK},
		{map[string]string{"fsFreeze": "true", "csi.storage.k8s.io/volumesnapshot/name": "x"}, true, codes.OK},
		{map[string]string{"fsFreeze": "no"}, false, codes.InvalidArgument},
		{map[string]string{"freeze": "false"}, false, codes.InvalidArgument},
	} {
		freeze, err := parseSnapshotParameters(c.in)
		if codeOrOK(err) != c.code || freeze != c.freeze {
			t.Errorf("%v: %v, %v", c.in, freeze, err)
		}
	}
}

func TestSizeRange(t *testing.T) {
	const least, most = mib, 64 * gib
	for _, c := range []struct {
		name            string
		required, limit int64
		want            int64
		code            codes.Code
	}{
		{"nothing asked", 0, 0, gib, codes.OK},
		{"exact", 3 * mib, 3 * mib, 3 * mib, codes.OK},
		{"rounded up", 3*mib + 1, 0, 3*mib + 4096, codes.OK},
		{"rounded up to the limit", 3*mib + 1, 3*mib + 4096, 3*mib + 4096, codes.OK},
		{"no multiple below the limit", 3*mib + 1, 3*mib + 4095, 0, codes.OutOfRange},
		{"only a limit", 0, 10 * mib, 10 * mib, codes.OK},
		{"a limit that is no multiple", 0, 10*mib + 5, 10 * mib, codes.OK},
		{"a limit above the default", 0, 2 * gib, gib, codes.OK},
		{"tiny", 1, 0, least, codes.OK},
		{"tiny and limited", 1, 4096, 0, codes.OutOfRange},
		{"largest", most, most, most, codes.OK},
		{"too large", most + 1, 0, 0, codes.OutOfRange},
		{"overflowing", 1<<63 - 1, 0, 0, codes.OutOfRange},
		{"negative", -1, 0, 0, codes.InvalidArgument},
		{"required beyond the limit", 2 * mib, mib, 0, codes.InvalidArgument},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := newSizeRange(&csi.CapacityRange{RequiredBytes: c.required, LimitBytes: c.limit})
			got := int64(0)
			if err == nil {
				got, err = r.choose(gib, least, most)
			}
			if codeOrOK(err) != c.code || got != c.want {
				t.Errorf("%d, %v; want %d, %v", got, err, c.want, c.code)
			}
		})
	}
}

func TestMaxSize(t *testing.T) {
	for clusterSize, want := range map[int64]int64{4 << 10: 8 << 40, 64 << 10: 64 << 40, 2 << 20: 64 << 40} {
		if got := maxSize(clusterSize); got != want {
			t.Errorf("clusters of %d bytes: %d, want %d", clusterSize, got, want)
		}
	}
}

func TestCheckCapability(t *testing.T) {
	block := blockCapability
	for _, c := range []struct {
		name string
		in   *csi.VolumeCapability
		code codes.Code
	}{
		{"none", nil, codes.InvalidArgument},
		{"no mode", block(csi.VolumeCapability_AccessMode_UNKNOWN), codes.InvalidArgument},
		{"writer", block(csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER), codes.OK},
		{"reader", block(csi.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY), codes.OK},
		{"single writer", block(csi.VolumeCapability_AccessMode_SINGLE_NODE_SINGLE_WRITER), codes.OK},
		{"several writers", block(csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER), codes.OK},
		{"readers on many nodes", block(csi.VolumeCapability_AccessMode_MULTI_NODE_READER_ONLY), codes.InvalidArgument},
		{"writer on many nodes", block(csi.VolumeCapability_AccessMode_MULTI_NODE_SINGLE_WRITER), codes.InvalidArgument},
		{"writers on many nodes", block(csi.VolumeCapability_AccessMode_MULTI_NODE_MULTI_WRITER), codes.InvalidArgument},
		{"default file system", mountCapability(""), codes.OK},
		{"xfs", mountCapability("xfs"), codes.OK},
		{"btrfs", mountCapability("btrfs"), codes.InvalidArgument},
		{"no access type", &csi.VolumeCapability{AccessMode: mountCapability("").GetAccessMode()}, codes.InvalidArgument},
		{"group", &csi.VolumeCapability{
			AccessMode: mountCapability("").GetAccessMode(),
			AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{VolumeMountGroup: "7"}},
		}, codes.InvalidArgument},
	} {
		if err := checkCapability(c.in); codeOrOK(err) != c.code {
			t.Errorf("%s: %v, want %v", c.name, err, c.code)
		}
	}
}

func mountCapability(fsType string) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_MULTI_WRITER},
		AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{FsType: fsType}},
	}
}

func blockCapability(mode csi.VolumeCapability_AccessMode_Mode) *csi.VolumeCapability {
	return &csi.VolumeCapability{
		AccessMode: &csi.VolumeCapability_AccessMode{Mode: mode},
		AccessType: &csi.VolumeCapability_Block{Block: &csi.VolumeCapability_BlockVolume{}},
	}
}

func TestPaging(t *testing.T) {
	first, err := newPage("volume", 2, "")
	must(t, err)
	if first.after != "" || !first.takes("a") || !first.takes("b") || first.next != "" || first.takes("c") {
		t.Errorf("first page: %+v", first)
	}
	next, err := newPage("volume", 0, first.next)
	must(t, err)
	if next.after != "b" {
		t.Errorf("next page: %+v", next)
	}
	for range 1000 {
		if !next.takes("c") || next.next != "" {
			t.Fatalf("a page without limit: %+v", next)
		}
	}
	for _, bad := range []string{"invalid-token", "7", token("snapshot", "b"), "!"} {
		if _, err := newPage("volume", 0, bad); codeOrOK(err) != codes.Aborted {
			t.Errorf("token %q: %v", bad, err)
		}
	}
	if _, err := newPage("volume", -1, ""); codeOrOK(err) != codes.InvalidArgument {
		t.Errorf("negative max_entries: %v", err)
	}
}

func TestCheckPath(t *testing.T) {
	for path, code := range map[string]codes.Code{
		"/var/lib/kubelet/pods/x/mount": codes.OK, "/a/..b": codes.OK,
		"": codes.InvalidArgument, "/": codes.InvalidArgument, "a/b": codes.InvalidArgument, "/a/../b": codes.InvalidArgument,
	} {
		if err := checkPath("target_path", path); codeOrOK(err) != code {
			t.Errorf("%q: %v, want %v", path, err, code)
		}
	}
}
