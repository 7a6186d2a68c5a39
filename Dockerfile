# The image of engine and plugin: one static binary, and the tools that a node needs to format, check, mount and grow
# file systems, without the rest of a distribution. Without a container engine, `make image` makes the same.
FROM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY cmd cmd
COPY pkg pkg
ARG VERSION=unknown
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$VERSION" -o /csi-qcow2 ./cmd/csi-qcow2

FROM debian:bookworm-slim AS tools
COPY hack/node-packages hack/image-root.sh /hack/
RUN apt-get update && xargs -a /hack/node-packages apt-get install -y --no-install-recommends && /hack/image-root.sh /root-fs

FROM scratch
COPY --from=tools /root-fs /
COPY --from=build /csi-qcow2 /usr/local/bin/csi-qcow2
ENTRYPOINT ["/usr/local/bin/csi-qcow2"]
