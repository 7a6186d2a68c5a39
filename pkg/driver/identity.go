package driver

import (
	"context"
	"strconv"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

type identity struct {
	csi.UnimplementedIdentityServer
	*Driver
}

// Keys of the manifest in the answer to GetPluginInfo: by which settings the plugin promises the space of which pool.
const (
	ManifestPool       = "pool"       // its directory
	ManifestReserve    = "reserve"    // bytes
	ManifestOvercommit = "overcommit" // a ratio
)

// GetPluginInfo looks at no disk: kubelet does not know the driver before it is answered.
func (i *identity) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: Name, VendorVersion: i.version, Manifest: map[string]string{
		ManifestPool:       i.poolDir,
		ManifestReserve:    strconv.FormatInt(i.capacity.reserve, 10),
		ManifestOvercommit: strconv.FormatFloat(i.capacity.overcommit, 'g', -1, 64),
	}}, nil
}

func (i *identity) GetPluginCapabilities(
	context.Context, *csi.GetPluginCapabilitiesRequest,
) (*csi.GetPluginCapabilitiesResponse, error) {
	resp := &csi.GetPluginCapabilitiesResponse{Capabilities: []*csi.PluginCapability{{
		Type: &csi.PluginCapability_VolumeExpansion_{VolumeExpansion: &csi.PluginCapability_VolumeExpansion{
			Type: csi.PluginCapability_VolumeExpansion_ONLINE,
		}},
	}}}
	for _, service := range []csi.PluginCapability_Service_Type{
		csi.PluginCapability_Service_CONTROLLER_SERVICE,
		csi.PluginCapability_Service_VOLUME_ACCESSIBILITY_CONSTRAINTS,
		csi.PluginCapability_Service_SNAPSHOT_ACCESSIBILITY_CONSTRAINTS,
	} {
		resp.Capabilities = append(resp.Capabilities, &csi.PluginCapability{
			Type: &csi.PluginCapability_Service_{Service: &csi.PluginCapability_Service{Type: service}},
		})
	}
	return resp, nil
}

// Probe tells that the plugin is alive, which it is as soon as it answers. It does not tell whether the pool's disk is
// mounted and the engine there: the liveness probe of the CSI project kills a plugin that says "not ready", and no restart
// would bring them back. Of those NodeGetStorageHealth tells, and UNAVAILABLE as the answer of each call that needs them.
func (i *identity) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{Ready: wrapperspb.Bool(true)}, nil
}
