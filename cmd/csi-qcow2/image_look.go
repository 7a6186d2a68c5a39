package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

const (
	defaultEngine = "unix:///run/csi-qcow2/engine.sock"
	// enginePatience is how long the engine may take to answer a question.
	enginePatience = 5 * time.Second
	// lookAttempts is how often an image that is changed meanwhile is looked at.
	lookAttempts = 20
)

// lookFlags are those of the commands that look at an image which others may have open.
type lookFlags struct {
	shared  bool
	engine  string
	current bool // what the user of an attached volume has written is committed to the file first
}

func addLookFlags(cmd *cobra.Command) *lookFlags {
	l := new(lookFlags)
	cmd.Flags().BoolVarP(&l.shared, "force-share", "U", false, "look at an image that is in use, as far as its file tells")
	addEngineFlag(cmd, &l.engine)
	return l
}

func addEngineFlag(cmd *cobra.Command, endpoint *string) {
	cmd.Flags().StringVar(endpoint, "engine", cmp.Or(os.Getenv("CSI_QCOW2_ENGINE"), defaultEngine),
		"`endpoint` of the engine that is asked about an attached volume; or in $CSI_QCOW2_ENGINE")
}

// looked is an image that is open for reading.
type looked struct {
	*qcow2.Image
	attached *attachedVolume // nil if it is not, or was not asked for
	shared   bool            // others may be writing it
}

// info describes the image; of an attached volume it says what the engine knows better.
func (l *looked) info() qcow2.Info {
	info := l.Info()
	if l.attached != nil {
		info.Size, info.Snapshots = l.attached.Size, l.snapshots()
	}
	return info
}

func (l *looked) snapshots() []qcow2.Snapshot {
	if l.attached == nil {
		return l.Snapshots()
	}
	return l.attached.snapshots
}

// attachedVolume is a volume that the engine serves.
type attachedVolume struct {
	engine.Attachment
	snapshots []qcow2.Snapshot // the whole ones
}

// commit has the volume's worker commit to the file what was written to the device, as its users' own flushes do.
func (v *attachedVolume) commit() error {
	if err := v.Err(); err != nil {
		return err // whoever opened its device would wait, or meet another's
	}
	device, err := os.Open(v.Device)
	if err != nil {
		return err
	}
	info, err := unix.IoctlLoopGetStatus64(int(device.Fd()))
	if err == nil && (info.Device != v.FileDevice || info.Inode != v.FileInode) {
		err = errors.New("it is no longer the volume's")
	}
	if err == nil {
		err = device.Sync()
	}
	return errors.Join(err, device.Close())
}

// open opens the image at path for reading. If it is in use, it must be that of an attached volume, or be opened with -U.
func (l *lookFlags) open(ctx context.Context, path string) (*looked, error) {
	if l.shared {
		img, err := qcow2.OpenShared(path)
		return &looked{Image: img, shared: true}, err
	}
	img, err := openImage(path, true)
	if err == nil {
		return &looked{Image: img}, nil
	}
	if !errors.Is(err, qcow2.ErrInUse) {
		return nil, err
	}
	attached, reason := askEngine(ctx, l.engine, path)
	if attached == nil {
		return nil, plainError{fmt.Sprintf("%v%s: with -U it is looked at all the same", err, reason), qcow2.ErrInUse}
	}
	if l.current {
		if err := attached.commit(); err != nil {
			return nil, fmt.Errorf("%s: flush %s: %w", printable(path), attached.Device, err)
		}
	}
	img, err = qcow2.OpenShared(path)
	return &looked{Image: img, attached: attached, shared: true}, err
}

// look opens the image at path, lets work look at it and closes it. work is called again if the image was changed meanwhile.
func (l *lookFlags) look(ctx context.Context, path string, work func(*looked) error) error {
	for range lookAttempts {
		img, err := l.open(ctx, path)
		if err != nil {
			return err
		}
		err = work(img)
		again := false
		if img.shared {
			again, _ = img.Changed() // if that cannot be told, what work says stands
		}
		if err = errors.Join(err, img.Close()); !again {
			return err
		}
	}
	return plainError{printable(path) + " changes too fast to be looked at: try again", qcow2.ErrInUse}
}

// askEngine returns what the engine says of the volume whose image is at path; nil if it is none, or not attached, and a
// reason if the engine does not answer.
func askEngine(ctx context.Context, endpoint, path string) (v *attachedVolume, reason string) {
	id := volumeOfImage(path)
	if id == "" {
		return nil, ""
	}
	ctx, cancel := context.WithTimeout(ctx, enginePatience)
	defer cancel()
	client, err := engine.NewClient(endpoint)
	if err != nil {
		return nil, fmt.Sprintf(" (%v)", err)
	}
	defer client.Close()
	attachments, err := client.List(ctx)
	if err != nil {
		return nil, fmt.Sprintf(" (no engine answers at %s)", endpoint)
	}
	for _, a := range attachments {
		if a.VolumeID != id {
			continue
		}
		all, err := client.ListSnapshots(ctx, id)
		if err != nil {
			return nil, fmt.Sprintf(" (the engine cannot say more: %v)", err)
		}
		v := &attachedVolume{Attachment: a}
		for _, s := range all {
			if !s.Pending {
				v.snapshots = append(v.snapshots, s.Snapshot)
			}
		}
		return v, ""
	}
	return nil, ""
}

// volumeOfImage returns the ID of the volume whose image a path is, "" if it is none of a pool.
func volumeOfImage(path string) string {
	absolute, err := filepath.Abs(path)
	if err == nil {
		absolute, err = filepath.EvalSymlinks(absolute)
	}
	if err != nil {
		return ""
	}
	id := filepath.Base(filepath.Dir(absolute))
	p, err := pool.Open(filepath.Join(filepath.Dir(absolute), "..", ".."))
	if err != nil || p.ImagePath(id) != absolute {
		return ""
	}
	return id
}
