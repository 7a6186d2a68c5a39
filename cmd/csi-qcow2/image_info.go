package main

import (
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

// imageInfo is the JSON of `image info`, with the keys of `qemu-img info --output=json`.
type imageInfo struct {
	Filename       string         `json:"filename"`
	Format         string         `json:"format"`
	VirtualSize    int64          `json:"virtual-size"`
	ActualSize     int64          `json:"actual-size"` // bytes that the file occupies
	ClusterSize    int64          `json:"cluster-size"`
	Dirty          bool           `json:"dirty-flag"`
	Snapshots      []snapshotInfo `json:"snapshots,omitempty"`
	FormatSpecific formatInfo     `json:"format-specific"`
	Attached       *attachedInfo  `json:"attached,omitempty"` // not QEMU's
}

// attachedInfo says where an attached volume is served.
type attachedInfo struct {
	Device    string `json:"device"`
	WorkerPID int    `json:"worker-pid"`
}

type formatInfo struct {
	Type string    `json:"type"`
	Data qcow2Info `json:"data"`
}

type qcow2Info struct {
	Compat          string `json:"compat"`
	CompressionType string `json:"compression-type"`
	RefcountBits    int    `json:"refcount-bits"`
	LazyRefcounts   bool   `json:"lazy-refcounts"`
	Corrupt         bool   `json:"corrupt"`
	ExtendedL2      bool   `json:"extended-l2"`
}

func newImageInfoCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "info FILE",
		Short: "Show what an image is and which snapshots it holds",
		Long: `Show what an image is and which snapshots it holds. JSON has the keys of ` + "`qemu-img info`" + `.

Of an attached volume the engine is asked for what it knows better. Any other image that is in use is shown with
-U as its file is at the moment.`,
		Example: `  csi-qcow2 image info disk.qcow2
  csi-qcow2 image info -U disk.qcow2 -o json`,
		Args: takes("FILE"),
	}
	output, look := addOutputFlag(cmd), addLookFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		var known qcow2.Info
		var info imageInfo
		err := look.look(cmd.Context(), args[0], func(img *looked) (err error) {
			known = img.info()
			if info, err = describe(args[0], known); err == nil && img.attached != nil {
				info.Attached = &attachedInfo{Device: img.attached.Device, WorkerPID: img.attached.WorkerPID}
			}
			return err
		})
		if err != nil {
			return err
		}
		return output.print(cmd.OutOrStdout(), info, func(w io.Writer) { info.table(w, known) })
	}
	return cmd
}

func describe(path string, i qcow2.Info) (imageInfo, error) {
	stat, err := os.Stat(path)
	if err != nil {
		return imageInfo{}, err
	}
	compat := "1.1"
	if i.Version == 2 {
		compat = "0.10"
	}
	info := imageInfo{
		Filename: path, Format: "qcow2",
		VirtualSize: i.Size, ClusterSize: i.ClusterSize, Dirty: i.DirtyBit,
		FormatSpecific: formatInfo{Type: "qcow2", Data: qcow2Info{
			Compat: compat, CompressionType: i.CompressionType, RefcountBits: i.RefcountBits,
			LazyRefcounts: i.LazyRefcounts, Corrupt: i.CorruptBit, ExtendedL2: i.ExtendedL2,
		}},
	}
	if s, ok := stat.Sys().(*syscall.Stat_t); ok {
		info.ActualSize = s.Blocks * 512
	}
	for _, s := range i.Snapshots {
		info.Snapshots = append(info.Snapshots, describeSnapshot(s))
	}
	return info, nil
}

func (info imageInfo) table(w io.Writer, i qcow2.Info) {
	mark := "clean"
	switch {
	case i.CorruptBit:
		mark = "corrupt"
	case i.DirtyBit:
		mark = "dirty"
	}
	fmt.Fprintf(w, "image:\t%s\n", printable(info.Filename))
	fmt.Fprintf(w, "format:\tqcow2 version %d\n", i.Version)
	fmt.Fprintf(w, "virtual size:\t%s (%d bytes)\n", humanSize(i.Size), i.Size)
	fmt.Fprintf(w, "occupies:\t%s of a file of %s\n", humanSize(info.ActualSize), humanSize(i.FileSize))
	fmt.Fprintf(w, "cluster size:\t%s\n", humanSize(i.ClusterSize))
	fmt.Fprintf(w, "refcounts:\t%d bits\n", i.RefcountBits)
	fmt.Fprintf(w, "compression:\t%s\n", i.CompressionType)
	fmt.Fprintf(w, "marked:\t%s\n", mark)
	if a := info.Attached; a != nil {
		fmt.Fprintf(w, "attached as:\t%s, served by PID %d\n", a.Device, a.WorkerPID)
	}
	fmt.Fprintf(w, "snapshots:\t%d\n", len(i.Snapshots))
	if len(i.Snapshots) > 0 {
		fmt.Fprintln(w)
		snapshotTable(w, i.Snapshots)
	}
}

// mapEntry is the JSON of `image map`, with the keys of `qemu-img map --output=json`.
type mapEntry struct {
	Start      int64  `json:"start"`
	Length     int64  `json:"length"`
	Depth      int    `json:"depth"`
	Present    bool   `json:"present"`
	Zero       bool   `json:"zero"`
	Data       bool   `json:"data"`
	Compressed bool   `json:"compressed"`
	Offset     *int64 `json:"offset,omitempty"`
}

func newImageMapCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "map FILE",
		Short: "Show where in the file each part of the disk lies",
		Long: `Show each extent of the active disk, or of a snapshot's: where it begins, how long it is, whether it is
data, compressed data, zeros or a hole (never written), and where in the file its data lies. JSON has the
keys of ` + "`qemu-img map`" + `.

The device of an attached volume is flushed first, so that the file says what the disk is. With -U it is what the
file says: what its user has not committed yet is missing. A snapshot is shown as it is.`,
		Example: `  csi-qcow2 image map disk.qcow2
  csi-qcow2 image map disk.qcow2 --snapshot before-upgrade -o json`,
		Args: takes("FILE"),
	}
	output, snapshot, look := addOutputFlag(cmd), addSnapshotFlags(cmd), addLookFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		look.current = !snapshot.given
		var extents []qcow2.Extent
		err := look.look(cmd.Context(), args[0], func(img *looked) (err error) {
			extents, err = readMap(img.Image, snapshot)
			return err
		})
		if err != nil {
			return err
		}
		return output.print(cmd.OutOrStdout(), mapEntries(extents), func(w io.Writer) { mapTable(w, extents) })
	}
	return cmd
}

func readMap(img *qcow2.Image, snapshot *snapshotFlags) ([]qcow2.Extent, error) {
	view, err := snapshot.open(img)
	if err != nil {
		return nil, err
	}
	defer view.Close()
	var extents []qcow2.Extent
	err = view.Extents(0, func(e qcow2.Extent) error {
		extents = append(extents, e)
		return nil
	})
	return extents, err
}

func mapEntries(extents []qcow2.Extent) []mapEntry {
	entries := make([]mapEntry, 0, len(extents))
	for _, e := range extents {
		data := e.Kind == qcow2.Data || e.Kind == qcow2.Compressed
		entry := mapEntry{
			Start: e.Offset, Length: e.Length,
			Present: e.Kind != qcow2.Unallocated, Zero: !data, Data: data, Compressed: e.Kind == qcow2.Compressed,
		}
		if e.Host >= 0 && e.Kind != qcow2.Compressed {
			entry.Offset = &e.Host
		}
		entries = append(entries, entry)
	}
	return entries
}

func mapTable(w io.Writer, extents []qcow2.Extent) {
	fmt.Fprintln(w, "OFFSET\tLENGTH\tKIND\tIN THE FILE")
	for _, e := range extents {
		host := "-"
		if e.Host >= 0 {
			host = fmt.Sprintf("%#x", e.Host)
		}
		fmt.Fprintf(w, "%#x\t%#x\t%s\t%s\n", e.Offset, e.Length, kindName(e.Kind), host)
	}
}

func kindName(k qcow2.ExtentKind) string {
	switch k {
	case qcow2.Unallocated:
		return "hole"
	case qcow2.Zero:
		return "zero"
	case qcow2.Data:
		return "data"
	case qcow2.Compressed:
		return "compressed"
	}
	return "unknown"
}
