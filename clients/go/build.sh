#!/bin/sh
# Builds the example with Debian's packages alone: `sh build.sh OUT` makes OUT/recommend.
# apt-get install golang-go golang-google-grpc-dev protobuf-compiler protoc-gen-go-1-3
# With modules: generate the package `inference` by protoc-gen-go and protoc-gen-go-grpc of today beside
# recommend.go, then `go mod init recommend && go mod tidy`. Debian's grpc reads messages of the older kind.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$1
root=$out/gopath/src/recommend
mkdir -p "$root/inference"
protoc -I "$here/../node" \
  --go_out=plugins=grpc,paths=source_relative,Minference.proto=recommend/inference:"$root/inference" inference.proto
cp "$here/recommend.go" "$root/"
GO111MODULE=off GOFLAGS= GOPATH="$out/gopath:/usr/share/gocode" \
  go build -o "$out/recommend" recommend
