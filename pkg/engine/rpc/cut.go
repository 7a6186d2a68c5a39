package rpc

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine/api"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// cutHeader carries, in the header of CreateSnapshot's response, what the snapshot will be.
const cutHeader = "snapshot-bin"

// SendCut tells the caller of CreateSnapshot that the instant of the snapshot has come.
func SendCut(ctx context.Context, s qcow2.Snapshot) {
	b, err := proto.Marshal(SnapshotToAPI(s))
	if err == nil {
		err = grpc.SendHeader(ctx, metadata.Pairs(cutHeader, string(b)))
	}
	if err != nil {
		klog.ErrorS(err, "The instant of a snapshot was not announced")
	}
}

// ReceiveCut is the other end of SendCut; nil if the call failed before.
func ReceiveCut(header metadata.MD) *api.Snapshot {
	var s api.Snapshot
	if b := header.Get(cutHeader); len(b) != 1 || proto.Unmarshal([]byte(b[0]), &s) != nil {
		return nil
	}
	return &s
}

// SnapshotToAPI is how a snapshot travels.
func SnapshotToAPI(s qcow2.Snapshot) *api.Snapshot {
	return &api.Snapshot{Id: s.ID, Name: s.Name, CreationTime: timestamppb.New(s.Date), DiskSize: s.DiskSize}
}
