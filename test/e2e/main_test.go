// Package e2e plays what users do with csi-qcow2 on a real cluster, through Kubernetes' objects alone. run.sh starts
// the cluster that it needs.
package e2e

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	snapshots "github.com/kubernetes-csi/external-snapshotter/client/v8/clientset/versioned"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// patience is how long anything in the cluster may take before the test fails. The machine may be small and busy.
const patience = 5 * time.Minute

var (
	restConfig *rest.Config
	client     *kubernetes.Clientset
	snapClient *snapshots.Clientset
)

func TestMain(m *testing.M) {
	os.Exit(func() int {
		var err error
		restConfig, err = clientcmd.BuildConfigFromFlags("", os.Getenv("KUBECONFIG"))
		if err != nil {
			panic(err)
		}
		restConfig.QPS, restConfig.Burst = 100, 200
		client = kubernetes.NewForConfigOrDie(restConfig)
		snapClient = snapshots.NewForConfigOrDie(restConfig)
		status := m.Run()
		if err := poolsEmpty(); err != nil && status == 0 {
			fmt.Fprintln(os.Stderr, err)
			status = 1
		}
		return status
	}())
}

// poolsEmpty tells which directories of volumes are left in the nodes' pools.
func poolsEmpty() error {
	left, err := filepath.Glob(filepath.Join(os.Getenv("STATE"), "n*/var/csi-qcow2/pool/volumes/*"))
	if err == nil && len(left) > 0 {
		err = fmt.Errorf("volumes are left: %v", left)
	}
	pools, _ := filepath.Glob(filepath.Join(os.Getenv("STATE"), "n*/var/csi-qcow2/pool/volumes"))
	if len(pools) == 0 {
		err = errors.Join(err, errors.New("no pool was found"))
	}
	return err
}
