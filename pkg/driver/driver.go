// Package driver is the CSI plugin of a node: the Identity, Controller and Node services on one unix
// socket, over a pool of volumes and the engine that serves the attached ones. It holds no state: it can be
// killed and started again at any moment.
package driver

import (
	"context"
	"errors"
	"sync"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"k8s.io/client-go/rest"
	"k8s.io/klog/v2"

	"github.com/csi-qcow2/csi-qcow2/pkg/driver/cluster"
	"github.com/csi-qcow2/csi-qcow2/pkg/pool"
)

// Name is the driver's name, as storage classes have it.
const Name = "qcow2.csi.dev"

// Options of a plugin.
type Options struct {
	Endpoint string // unix:///path of the CSI socket
	NodeID   string // the Kubernetes node's name, at most 256 bytes
	PoolDir  string // may become a pool later: until then every call is UNAVAILABLE
	Engine   Engine // an *engine.Client; the caller closes it after Run
	Version  string // of this program
	// Reserve is how many bytes of the pool's file system are promised to nobody. Usually DefaultReserve.
	Reserve int64
	// Overcommit is how much may be promised for each free byte; 0 = DefaultOvercommit.
	Overcommit float64
	// SnapshotLimit is how much a volume's snapshots may keep, in percent of its size, if its StorageClass says nothing;
	// 0 = DefaultSnapshotLimit.
	SnapshotLimit int64
	// MaxVolumes is how many volumes the scheduler may place on the node at once; 0: any number.
	MaxVolumes int64
	// Metrics, if not nil, gets the plugin's metrics.
	Metrics prometheus.Registerer
	// Cluster, if not nil, is how the API server of the plugin's Kubernetes cluster is reached.
	Cluster *rest.Config
}

// Driver is what the three services share.
type Driver struct {
	nodeID, segment, version  string
	snapshotLimit, maxVolumes int64 // see Options

	engine   Engine
	images   *images
	capacity *capacity
	creating *creations
	// busy is held by operations on "volume ID" (its metadata), "node volume ID" (its mounts) and
	// "snapshot NAME", always in the order snapshot, volume, node.
	busy *keyedLock

	poolDir  string
	poolMu   sync.Mutex
	openPool *pool.Pool // nil until there is one, guarded by poolMu

	programs *programs
	metrics  *metrics
}

// Run serves until ctx ends, then lets the calls that are under way finish, ends the copies that are, and
// removes the socket.
func Run(ctx context.Context, o Options) error {
	if o.NodeID == "" || len(o.NodeID) > 256 {
		return refuse(errInvalid, "node ID of %d bytes", len(o.NodeID))
	}
	if o.Engine == nil {
		return refuse(errInvalid, "no engine")
	}
	if o.Overcommit == 0 {
		o.Overcommit = DefaultOvercommit
	}
	if o.SnapshotLimit == 0 {
		o.SnapshotLimit = DefaultSnapshotLimit
	}
	if o.Overcommit < 0 || o.Reserve < 0 || o.SnapshotLimit < 0 || o.MaxVolumes < 0 {
		return refuse(errInvalid, "overcommit %v, reserve %d, snapshot limit %d, volumes %d", o.Overcommit, o.Reserve, o.SnapshotLimit, o.MaxVolumes)
	}
	ns, err := newNamespace()
	if err != nil {
		return err
	}
	defer ns.Close()
	listener, err := listen(ctx, o.Endpoint)
	if err != nil {
		return err
	}
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	var background sync.WaitGroup
	defer background.Wait()
	defer stop()
	d := newDriver(work, o, ns)
	if o.Metrics != nil {
		if err := d.register(o.Metrics); err != nil {
			return errors.Join(err, listener.Close())
		}
	}
	if _, err := d.pool(); err != nil {
		klog.FromContext(ctx).Error(err, "The pool is not usable yet", "pool", o.PoolDir)
	}
	if o.Cluster != nil {
		inCluster, err := d.inCluster(o.Cluster)
		if err != nil {
			return errors.Join(err, listener.Close())
		}
		background.Go(func() { inCluster(work) })
	}
	server := d.newServer()
	klog.FromContext(ctx).Info("Serving", "endpoint", o.Endpoint, "node", o.NodeID, "pool", o.PoolDir, "version", o.Version)
	err = serve(ctx, server, listener, stop)
	stop()
	d.creating.wait()
	return err
}

func newDriver(work context.Context, o Options, ns *namespace) *Driver {
	return &Driver{
		nodeID: o.NodeID, segment: topologySegment(o.NodeID), version: o.Version,
		snapshotLimit: o.SnapshotLimit, maxVolumes: o.MaxVolumes,
		engine:   o.Engine,
		images:   newImages(),
		capacity: &capacity{node: o.NodeID, reserve: o.Reserve, overcommit: o.Overcommit, pending: map[string]int64{}, snapshots: map[string]struct{}{}},
		creating: newCreations(work),
		busy:     newKeyedLock(),
		poolDir:  o.PoolDir,
		metrics:  newMetrics(),
		programs: &programs{ns: ns, running: map[string]string{}},
	}
}

// inCluster returns what the plugin does in its cluster until a context ends.
func (d *Driver) inCluster(config *rest.Config) (func(context.Context), error) {
	clients, err := cluster.Connect(config)
	if err != nil {
		return nil, err
	}
	o := cluster.Options{Clients: clients, Driver: Name, Node: d.nodeID, Owns: d.ownsHandle, Attached: d.attachedVolumes}
	return func(ctx context.Context) { cluster.Run(ctx, o) }, nil
}

func (d *Driver) newServer() *grpc.Server {
	server := grpc.NewServer(grpc.ChainUnaryInterceptor(d.metrics.measureCalls, logCalls, statusCodes, recoverPanics))
	csi.RegisterIdentityServer(server, &identity{Driver: d})
	csi.RegisterControllerServer(server, &controller{Driver: d})
	csi.RegisterNodeServer(server, &node{Driver: d})
	return server
}

// refillReserve restores the pool's reserve after what may have used it.
func refillReserve(ctx context.Context, p *pool.Pool) {
	if err := p.KeepReserve(); err != nil {
		klog.FromContext(ctx).Error(err, "The pool has no reserve: deletions on a full file system may fail")
	}
}

// pool returns the pool if its directory is one now, and this node's. pool.ErrNotReady if it is not, or holds another pool
// than before.
func (d *Driver) pool() (*pool.Pool, error) {
	d.poolMu.Lock()
	defer d.poolMu.Unlock()
	if d.openPool != nil {
		return d.openPool, d.openPool.Ready()
	}
	p, err := pool.OpenOn(d.poolDir, d.nodeID)
	if err != nil {
		return nil, err
	}
	// What an interrupted call left costs space, and nothing else.
	if err := errors.Join(p.Clean(), p.KeepReserve()); err != nil {
		klog.Background().Error(err, "The pool was not put in order", "pool", d.poolDir)
	}
	d.openPool = p
	return p, nil
}
