#!/bin/sh
# Builds the example with Debian's packages alone: `sh build.sh OUT` makes OUT/recommend, which runs it.
# apt-get install default-jdk-headless libgrpc-java libnetty-java libperfmark-java libprotobuf-java \
#   protobuf-compiler protobuf-compiler-grpc-java-plugin
# With Maven or Gradle: grpc-netty, grpc-protobuf, grpc-stub.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$1
jars=/usr/share/java
path=
for jar in grpc-api grpc-context grpc-core grpc-netty grpc-protobuf grpc-protobuf-lite grpc-stub protobuf guava \
  perfmark-api perfmark-impl netty-buffer netty-codec netty-codec-http netty-codec-http2 netty-common netty-handler \
  netty-resolver netty-transport; do
  path=$path:$jars/$jar.jar
done
mkdir -p "$out/source" "$out/classes"
protoc -I "$here/../node" --java_out="$out/source" --plugin=protoc-gen-grpc=/usr/bin/grpc_java_plugin \
  --grpc_out="$out/source" inference.proto
# an annotation of a package that Java has no longer says who wrote the file
sed -i '/^@javax.annotation.Generated(/,/)$/d' "$out/source/inference/GRPCInferenceServiceGrpc.java"
javac -nowarn -d "$out/classes" -cp "${path#:}" "$here/Recommend.java" $(find "$out/source" -name '*.java')
printf '#!/bin/sh\nexec java -cp "%s" Recommend "$@"\n' "$out/classes$path" > "$out/recommend"
chmod +x "$out/recommend"
