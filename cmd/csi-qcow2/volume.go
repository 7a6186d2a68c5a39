package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/csi-qcow2/csi-qcow2/pkg/engine"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
	"github.com/csi-qcow2/csi-qcow2/pkg/qcow2"
)

const defaultPool = "/var/lib/csi-qcow2/pool"

func newVolumeCommand() *cobra.Command {
	group := newGroup("volume", "Look at the volumes of a pool",
		`Look at the volumes of a pool, whether they are attached or not. Nothing is changed, and nobody is kept from
attaching one meanwhile.`,
		newVolumeListCommand(), newVolumeShowCommand())
	group.Example = `  csi-qcow2 volume list
  csi-qcow2 volume show pvc-0d2b7ac4-9b4e-4a57-8b0e-9a4f1d3c2e11`
	return group
}

// volumeFlags say where to look for volumes.
type volumeFlags struct {
	pool   string
	engine string
}

func addVolumeFlags(cmd *cobra.Command) *volumeFlags {
	v := new(volumeFlags)
	cmd.Flags().StringVar(&v.pool, "pool", cmp.Or(os.Getenv("CSI_QCOW2_POOL"), defaultPool), "`directory` of the volumes; or in $CSI_QCOW2_POOL")
	addEngineFlag(cmd, &v.engine)
	return v
}

// attachments returns what the engine serves, by volume ID; nil if it does not answer.
func (v *volumeFlags) attachments(ctx context.Context) map[string]engine.Attachment {
	client, err := engine.NewClient(v.engine)
	if err != nil {
		return nil
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(ctx, enginePatience)
	defer cancel()
	list, err := client.List(ctx)
	if err != nil {
		return nil
	}
	all := make(map[string]engine.Attachment, len(list))
	for _, a := range list {
		all[a.VolumeID] = a
	}
	return all
}

// volumeInfo is a volume in JSON.
type volumeInfo struct {
	ID         string            `json:"id"`
	Name       string            `json:"name"`
	State      string            `json:"state"`
	Device     string            `json:"device,omitempty"`
	WorkerPID  int               `json:"worker-pid,omitempty"`
	Trouble    string            `json:"trouble,omitempty"`
	Size       int64             `json:"size"`           // virtual bytes
	Occupied   int64             `json:"occupied"`       // bytes of the pool's file system
	Promised   int64             `json:"promised"`       // bytes that it may still come to occupy
	Claim      pool.Claim        `json:"claim,omitzero"` // what it was made for, as far as known
	Mode       string            `json:"mode,omitempty"`
	Source     string            `json:"source,omitempty"`
	Created    time.Time         `json:"created"`
	Parameters map[string]string `json:"parameters,omitempty"`
	Image      string            `json:"image"`
	Snapshots  []snapshotInfo    `json:"snapshots"`

	snapshots []qcow2.Snapshot
}

// Values of volumeInfo.State.
const (
	stateAttached   = "attached"
	stateDetached   = "detached"
	stateInUse      = "in use"     // by whoever it is: no engine answers
	stateDeleted    = "deleted"    // only its snapshots remain
	stateTroubled   = "troubled"   // it is attached, and its users wait or get errors
	stateUnreadable = "unreadable" // see Trouble
)

// describeVolume tells all about a volume. served is what the engine serves, nil if it does not answer.
func describeVolume(p *pool.Pool, a pool.Account, served map[string]engine.Attachment) volumeInfo {
	v := volumeInfo{
		ID: a.ID, Name: a.Name, Size: max(a.LeastSize(), a.DiskSize), Occupied: a.Occupied, Promised: a.Promised, Claim: a.Claim, Mode: a.Mode,
		Source: a.Source, Created: a.Created, Parameters: a.Parameters, Image: p.ImagePath(a.ID), State: stateDetached,
		Snapshots: []snapshotInfo{},
	}
	trouble := a.Err
	if img, err := qcow2.OpenShared(v.Image); err == nil {
		v.snapshots = img.Snapshots()
		err = img.Close()
		trouble = errors.Join(trouble, err)
	} else {
		trouble = errors.Join(trouble, err)
	}
	for _, s := range v.snapshots {
		v.Snapshots = append(v.Snapshots, describeSnapshot(s))
	}
	attachment, attached := served[a.ID]
	switch {
	case attached:
		v.State, v.Device, v.WorkerPID, v.Trouble = stateAttached, attachment.Device, attachment.WorkerPID, attachment.Failure
		if attachment.State != engine.Served {
			v.State = stateTroubled
		}
	case trouble != nil:
		v.State, v.Trouble = stateUnreadable, trouble.Error()
	case a.Tombstone:
		v.State = stateDeleted
	case served == nil && len(usersOf(v.Image)) > 0:
		v.State = stateInUse
	}
	return v
}

// volumes returns all volumes of the pool.
func (v *volumeFlags) volumes(ctx context.Context) ([]volumeInfo, error) {
	p, err := pool.Open(v.pool)
	if err != nil {
		return nil, fmt.Errorf("%w: --pool says where it is", err)
	}
	accounts, err := p.Accounts()
	if err != nil {
		return nil, err
	}
	served := v.attachments(ctx)
	list := make([]volumeInfo, 0, len(accounts))
	for _, a := range accounts {
		list = append(list, describeVolume(p, a, served))
	}
	return list, nil
}

func newVolumeListCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the volumes of a pool",
		Long: `List the volumes of a pool: their disk's size, what their image occupies, how many snapshots it holds, and whether
the engine serves them, and for which claim they were made. "deleted" is a volume of which only the snapshots
remain; it goes with the last one.

If no engine answers, a volume that any process has open is "in use".`,
		Example: `  csi-qcow2 volume list
  csi-qcow2 volume list --pool /mnt/disk/pool -o json`,
		Args: takes(),
	}
	flags, output := addVolumeFlags(cmd), addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		list, err := flags.volumes(cmd.Context())
		if err != nil {
			return err
		}
		return output.print(cmd.OutOrStdout(), list, func(w io.Writer) {
			fmt.Fprintln(w, "NAME\tSIZE\tOCCUPIES\tSNAPSHOTS\tSTATE\tCLAIM")
			for _, v := range list {
				fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s\n", printable(cmp.Or(v.Name, v.ID)), humanSize(v.Size), humanSize(v.Occupied),
					len(v.Snapshots), v.State, printable(cmp.Or(v.claim(), "-")))
			}
		})
	}
	return cmd
}

func newVolumeShowCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "show ID",
		Short: "Show what is known of a volume",
		Long: `Show what is known of a volume. ID is its ID, the volumeHandle of its PersistentVolume, or its name, or
NAMESPACE/NAME of its claim.`,
		Example: `  csi-qcow2 volume show pvc-0d2b7ac4-9b4e-4a57-8b0e-9a4f1d3c2e11 -o json`,
		Args:    takes("ID"),
	}
	flags, output := addVolumeFlags(cmd), addOutputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		list, err := flags.volumes(cmd.Context())
		if err != nil {
			return err
		}
		v, err := chooseVolume(list, args[0])
		if err != nil {
			return err
		}
		return output.print(cmd.OutOrStdout(), v, v.table)
	}
	return cmd
}

// claim returns the claim's namespace and name, as in "default/data"; "" if it is not known.
func (v volumeInfo) claim() string {
	if v.Claim.Name == "" {
		return ""
	}
	return v.Claim.Namespace + "/" + v.Claim.Name
}

// chooseVolume returns the volume that has the ID, or the name, or the claim; of one name, that which is not deleted.
func chooseVolume(list []volumeInfo, name string) (volumeInfo, error) {
	for _, match := range []func(volumeInfo) bool{
		func(v volumeInfo) bool { return v.ID == name },
		func(v volumeInfo) bool { return (v.Name == name || v.claim() == name) && v.State != stateDeleted },
		func(v volumeInfo) bool { return v.Name == name || v.claim() == name },
	} {
		if i := slices.IndexFunc(list, match); i >= 0 {
			return list[i], nil
		}
	}
	return volumeInfo{}, fmt.Errorf("the pool has no volume %s: see csi-qcow2 volume list", printable(name))
}

func (v volumeInfo) table(w io.Writer) {
	row := func(key, format string, args ...any) { fmt.Fprintf(w, "%s:\t%s\n", key, fmt.Sprintf(format, args...)) }
	row("volume", "%s", v.ID)
	row("name", "%s", printable(v.Name))
	switch {
	case v.Device != "":
		row("state", "%s as %s, served by PID %d", v.State, v.Device, v.WorkerPID)
	case v.State == stateDeleted:
		row("state", "%s, but for its snapshots", v.State)
	default:
		row("state", "%s", v.State)
	}
	if v.Trouble != "" {
		row("trouble", "%s", v.Trouble)
	}
	row("size", "%s (%d bytes)", humanSize(v.Size), v.Size)
	row("occupies", "%s", humanSize(v.Occupied))
	row("promised", "%s more", humanSize(v.Promised))
	if v.claim() != "" {
		row("claim", "%s", printable(v.claim()))
	}
	if v.Mode != "" {
		row("mode", "%s", v.Mode)
	}
	if v.Source != "" {
		row("made from", "%s", printable(v.Source))
	}
	row("created", "%s", localTime(v.Created))
	for _, key := range slices.Sorted(maps.Keys(v.Parameters)) {
		row(printable(key), "%s", printable(v.Parameters[key]))
	}
	row("image", "%s", printable(v.Image))
	row("snapshots", "%d", len(v.snapshots))
	if len(v.snapshots) > 0 {
		fmt.Fprintln(w)
		snapshotTable(w, v.snapshots)
	}
}
