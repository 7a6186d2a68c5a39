// Command livenessprobe stands in for the sidecar of that name, which is not served as a Go module: it answers HTTP
// /healthz with what the plugin's Probe says. It takes the flags of the original that the manifests use.
package main

import (
	"context"
	"flag"
	"log"
	"net/http"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

func main() {
	address := flag.String("csi-address", "", "CSI socket")
	port := flag.String("health-port", "9808", "port of /healthz")
	flag.Parse()
	conn, err := grpc.NewClient("unix://"+*address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		log.Fatal(err)
	}
	plugin := csi.NewIdentityClient(conn)
	http.HandleFunc("/healthz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), time.Second)
		defer cancel()
		// As the original does it: absent means ready, and "not ready" is as bad as no answer.
		answer, err := plugin.Probe(ctx, &csi.ProbeRequest{})
		switch ready := answer.GetReady(); {
		case err != nil:
			http.Error(w, err.Error(), http.StatusInternalServerError)
		case ready != nil && !ready.GetValue():
			http.Error(w, "driver responded but is not ready", http.StatusInternalServerError)
		}
	})
	log.Fatal(http.ListenAndServe(":"+*port, nil))
}
