package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/csi-qcow2/csi-qcow2/pkg/driver"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// defaultPlugin is where the manifests have the plugin's socket, on the node.
const defaultPlugin = "unix:///var/lib/kubelet/plugins/" + driver.Name + "/csi.sock"

// poolStatus is the JSON of `pool status`. Sizes are in bytes.
type poolStatus struct {
	Directory  string       `json:"directory"`
	UUID       string       `json:"uuid"`
	Total      int64        `json:"total"` // of the file system
	Free       int64        `json:"free"`
	Occupied   int64        `json:"occupied"` // by volumes
	Promised   int64        `json:"promised"` // that volumes may still come to occupy
	Reserved   int64        `json:"reserved"` // free, and promised to no volume
	Overcommit float64      `json:"overcommit"`
	Assumed    bool         `json:"assumed"`   // reserved and overcommit: no plugin was asked
	Left       int64        `json:"left"`      // that can be promised to new volumes
	Deletions  int64        `json:"deletions"` // set aside for deletions when the file system is full
	Volumes    []poolVolume `json:"volumes"`
}

type poolVolume struct {
	ID       string `json:"id"`
	Name     string `json:"name"`
	Size     int64  `json:"size"`
	Occupied int64  `json:"occupied"`
	Promised int64  `json:"promised"`
}

func newPoolStatusCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status DIR",
		Short: "Show what a pool has, what it has promised, and to whom",
		Long: `Show the space of a pool: what is free, what each volume occupies and may still come to occupy, and what is left
to be promised to new ones, (free - reserved) * overcommit - promised. How much is reserved, and the overcommit
ratio, are the CSI plugin's settings, for which it is asked. Give them to see what others would make of it, or
where no plugin runs.

A volume may come to occupy its size, and one with snapshots all of its size beside what it has, for they keep
what it overwrites.`,
		Example: `  csi-qcow2 pool status /var/lib/csi-qcow2/pool
  csi-qcow2 pool status /var/lib/csi-qcow2/pool --reserve 10G --overcommit 2 -o json`,
		Args: takes("DIR"),
	}
	output := addOutputFlag(cmd)
	reserve := sizeFlag(driver.DefaultReserve)
	cmd.Flags().Var(&reserve, "reserve", "space of the pool's file system that is promised to no volume")
	overcommit := ratioFlag(driver.DefaultOvercommit)
	cmd.Flags().Var(&overcommit, "overcommit", "bytes promised to volumes for each free byte")
	plugin := cmd.Flags().String("plugin", os.Getenv("CSI_QCOW2_PLUGIN"),
		"`endpoint` of the CSI plugin that is asked; or in $CSI_QCOW2_PLUGIN; without, the node's")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		p, err := pool.Open(args[0])
		if err != nil {
			return err
		}
		given := settings{int64(reserve), float64(overcommit)}
		running, err := askPlugin(cmd.Context(), cmp.Or(*plugin, defaultPlugin), p)
		assumed := err != nil
		if !assumed {
			if !cmd.Flags().Changed("reserve") {
				given.reserve = running.reserve
			}
			if !cmd.Flags().Changed("overcommit") {
				given.overcommit = running.overcommit
			}
		}
		status, err := poolStatusOf(p, given)
		if err != nil {
			return err
		}
		status.Assumed = assumed
		return output.print(cmd.OutOrStdout(), status, status.table)
	}
	return cmd
}

// settings are those by which a plugin promises its pool's space.
type settings struct {
	reserve    int64 // bytes
	overcommit float64
}

// askPlugin returns the settings of the plugin at endpoint, an error if that does not tell them for the pool.
func askPlugin(ctx context.Context, endpoint string, p *pool.Pool) (s settings, err error) {
	conn, err := grpc.NewClient(endpoint, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return s, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, enginePatience)
	defer cancel()
	info, err := csi.NewIdentityClient(conn).GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
	if err != nil {
		return s, err
	}
	manifest := info.GetManifest()
	served, err := os.Stat(manifest[driver.ManifestPool])
	if err != nil {
		return s, err
	}
	if dir, err := os.Stat(p.Dir()); err != nil || !os.SameFile(served, dir) {
		return s, errors.Join(errors.New("it serves another pool"), err)
	}
	if s.reserve, err = strconv.ParseInt(manifest[driver.ManifestReserve], 10, 64); err != nil {
		return s, err
	}
	s.overcommit, err = strconv.ParseFloat(manifest[driver.ManifestOvercommit], 64)
	return s, err
}

func poolStatusOf(p *pool.Pool, with settings) (poolStatus, error) {
	space, err := p.Space(nil)
	if err != nil {
		return poolStatus{}, err
	}
	accounts, err := p.Accounts()
	if err != nil {
		return poolStatus{}, err
	}
	deletions, err := p.Reserve()
	if err != nil {
		return poolStatus{}, err
	}
	s := poolStatus{
		Directory: p.Dir(), UUID: p.UUID(), Total: space.Total, Free: space.Free, Occupied: space.Used, Promised: space.Promised,
		Reserved: with.reserve, Overcommit: with.overcommit, Left: max(0, driver.Left(space, with.reserve, with.overcommit)),
		Deletions: deletions,
		Volumes:   make([]poolVolume, 0, len(accounts)),
	}
	for _, a := range accounts {
		s.Volumes = append(s.Volumes, poolVolume{
			ID: a.ID, Name: a.Name, Size: max(a.LeastSize(), a.DiskSize), Occupied: a.Occupied, Promised: a.Promised,
		})
	}
	return s, nil
}

func (s poolStatus) table(w io.Writer) {
	fmt.Fprintf(w, "pool:\t%s\n", printable(s.Directory))
	fmt.Fprintf(w, "UUID:\t%s\n", s.UUID)
	fmt.Fprintf(w, "file system:\t%s, %s free\n", humanSize(s.Total), humanSize(s.Free))
	fmt.Fprintf(w, "volumes:\t%d, which occupy %s\n", len(s.Volumes), humanSize(s.Occupied))
	fmt.Fprintf(w, "promised:\t%s more to them\n", humanSize(s.Promised))
	fmt.Fprintf(w, "reserved:\t%s, promised to none\n", humanSize(s.Reserved))
	fmt.Fprintf(w, "overcommit:\t%g\n", s.Overcommit)
	fmt.Fprintf(w, "left:\t%s for new volumes\n", humanSize(s.Left))
	fmt.Fprintf(w, "set aside:\t%s for deletions on a full disk\n", humanSize(s.Deletions))
	if s.Assumed {
		fmt.Fprintln(w, "assumed:\treserved and overcommit, since no plugin answers (--plugin)")
	}
	if len(s.Volumes) == 0 {
		return
	}
	fmt.Fprintln(w)
	fmt.Fprintln(w, "NAME\tSIZE\tOCCUPIES\tPROMISED")
	for _, v := range s.Volumes {
		name := v.Name
		if name == "" {
			name = v.ID
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", printable(name), humanSize(v.Size), humanSize(v.Occupied), humanSize(v.Promised))
	}
}
