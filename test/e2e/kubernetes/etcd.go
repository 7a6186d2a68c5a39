package main

import (
	"net/url"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/server/v3/embed"
)

// etcdCommand returns a one-member etcd for a cluster that is thrown away: it never syncs its files.
func etcdCommand() *cobra.Command {
	var dir string
	c := &cobra.Command{
		Use:          "etcd",
		Args:         cobra.NoArgs,
		SilenceUsage: true,
		RunE: func(_ *cobra.Command, _ []string) error {
			cfg := embed.NewConfig()
			cfg.Dir = dir
			cfg.UnsafeNoFsync = true
			cfg.LogLevel = "warn"
			client, peer := url.URL{Scheme: "http", Host: "127.0.0.1:2379"}, url.URL{Scheme: "http", Host: "127.0.0.1:2380"}
			cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
			cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
			cfg.InitialCluster = cfg.InitialClusterFromName(cfg.Name)
			e, err := embed.StartEtcd(cfg)
			if err != nil {
				return err
			}
			defer e.Close()
			return <-e.Err()
		},
	}
	c.Flags().StringVar(&dir, "data-dir", "etcd", "directory of the data")
	return c
}
