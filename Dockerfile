# The image of engine and plugin: one static binary, and the tools that a node needs to format, check,
# mount and grow file systems. Without a registry, `make image` makes the same.
FROM golang:1.26-bookworm AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY cmd cmd
COPY pkg pkg
ARG VERSION=unknown
RUN CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$VERSION" -o /csi-qcow2 ./cmd/csi-qcow2

FROM debian:bookworm-slim
RUN --mount=type=bind,source=hack/node-packages,target=/node-packages \
    apt-get update && \
    xargs -a /node-packages apt-get install -y --no-install-recommends && \
    rm -rf /var/lib/apt/lists/*
COPY --from=build /csi-qcow2 /usr/local/bin/csi-qcow2
ENTRYPOINT ["/usr/local/bin/csi-qcow2"]
