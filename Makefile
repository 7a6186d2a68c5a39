# csi-qcow2. `make` alone says what there is to make.

GO      ?= go
# What the manifests name, and the image and the binary are.
VERSION ?= $(shell cat VERSION)
LDFLAGS := -s -w -X main.version=$(VERSION)
TOOL    := $(GO) tool -modfile=tools/go.mod

.DEFAULT_GOAL := help
.PHONY: help build demo test crash survive soak fuzz differential damage mutants lint fmt generate verify bench man image e2e cluster-up cluster-down setup clean

help: ## say what there is to make
	@echo 'Usage: make TARGET, as root on Debian 12 with Go, make and git; the rest is installed when it is missing.'
	@echo
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## build bin/csi-qcow2, static
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o bin/csi-qcow2 ./cmd/csi-qcow2

man: build ## write the manual pages of all commands to dist/man
	bin/csi-qcow2 man dist/man

demo: build ## play a volume's whole life against a temporary pool, in under two minutes
	@hack/setup.sh demo
	bin/csi-qcow2 demo

test: ## run every test: units, QEMU's tools as oracle, csi-sanity, kill and restart
	@hack/setup.sh test
	@hack/test.sh

crash: ## crash images at 200,000 moments, make every call of the file fail, and cut the power under pools
	@hack/setup.sh test
	@hack/crash.sh

survive: ## kill workers KILLS=200 times, and change engines CHANGES=50 times in each way, under load, each with resending and with a journal
	@hack/setup.sh test
	@hack/survive.sh $(or $(KILLS),200) $(or $(CHANGES),50)

soak: ## let two volumes live for SOAK=2h under load, with kills, snapshots, growing and upgrades
	@hack/setup.sh test
	@hack/soak.sh $(or $(SOAK),2h)

fuzz: ## feed hostile images to the engine, FUZZTIME=1h for each group of targets
	@hack/setup.sh test
	@FUZZTIME=$(or $(FUZZTIME),1h) hack/fuzz.sh

differential: ## let QEMU and us take turns on HISTORIES=5000 random images, and say what was tried
	@hack/setup.sh test
	@bash -o pipefail -c 'nice $(GO) test ./pkg/qcow2 -run "TestDifferential$$" -differential $(or $(HISTORIES),5000) \
		-parallel 8 -timeout 0 -v | grep --line-buffered -vE "^ *(===|--- PASS)"'

damage: ## damage DAMAGED=300 images, check them as QEMU does, repair and read them; and use as many as QEMU does
	@hack/setup.sh test
	nice $(GO) test ./pkg/qcow2 -run "TestDamage$$|TestUseOfDamaged$$" -damaged $(or $(DAMAGED),300) -used $(or $(DAMAGED),300) -sound 100 -timeout 0 -v | grep --line-buffered -vE "^ *(===|--- PASS) "

mutants: ## take each sync, barrier and lock out, in turn, and say which no test misses: MUTANTS=pkg/qcow2 MUTANTFLAGS='-sample 10'
	@hack/setup.sh test
	nice $(GO) run ./hack/mutants $(MUTANTFLAGS) $(MUTANTS)

lint: verify ## check style, the generated code and the scripts
	@hack/setup.sh lint
	$(GO) mod tidy -diff
	$(TOOL) golangci-lint run --allow-parallel-runners
	hack/imports.sh
	$(GO) run ./hack/circles
	CGO_ENABLED=0 GOARCH=arm64 $(GO) vet ./...
	CGO_ENABLED=0 GOARCH=arm64 $(GO) build -o /dev/null ./cmd/csi-qcow2
	shellcheck hack/*.sh .ci/run test/e2e/*.sh test/e2e/cluster/*.sh test/e2e/cluster/kubectl test/e2e/guest/*

fmt: ## format the Go code
	$(TOOL) gofumpt -l -w cmd pkg

generate: ## regenerate pkg/engine/api from its .proto, and docs/configuration.md from the program
	@hack/setup.sh generate
	@hack/generate.sh .
	$(GO) test ./cmd/csi-qcow2 -run "TestConfigurationPage$$" -write-configuration

verify: ## check that the generated code and page are what their sources give
	@hack/setup.sh generate
	@hack/generate.sh --check
	$(GO) test ./cmd/csi-qcow2 -run "TestConfigurationPage$$"

bench: build ## compare with QEMU in one run: BENCH=offline BENCHFLAGS='-sizes 64G -pairs 3'
	@hack/setup.sh test
	$(GO) run ./hack/bench -run '$(or $(BENCH),.)' $(BENCHFLAGS)

image: ## write dist/csi-qcow2.tar, the image of the driver and its tools, without a registry
	@hack/setup.sh image
	@VERSION=$(VERSION) hack/image.sh

e2e: ## run the tests on a real cluster, which is built the first time (a quarter of an hour or more) and taken down
	@hack/setup.sh e2e
	@test/e2e/run.sh

cluster-up: ## start a cluster of two nodes with the driver, or with EMPTY=1 without, and say how to use it
	@hack/setup.sh e2e
	@test/e2e/cluster/up.sh 2
	@echo "Use it with test/e2e/cluster/kubectl, end it with make cluster-down."

cluster-down: ## end that cluster and remove everything that it left
	@test/e2e/cluster/down.sh

setup: ## install the Debian packages that any of the above needs
	@hack/setup.sh all

clean: ## remove what was built
	rm -rf bin dist .cache
