#!/usr/bin/env bash
# Runs in the first stage of both images: an environment with the versions of a lock, our own package, and a
# list of what is in it. No compiler, no cache, no pip and no bytecode get into the image.
#
#   install.sh LOCK FOLDER
set -euo pipefail
lock=$1 folder=$2

# The base's own pip installs into it from outside, and stays behind.
python3 -m venv --without-pip --copies "$folder" 2>/dev/null || python3 -m venv --without-pip "$folder"
install=(python3 -m pip --python "$folder/bin/python" --no-cache-dir --disable-pip-version-check --quiet
  install --no-deps --no-compile --root-user-action=ignore)
"${install[@]}" --only-binary=:all: -r "$lock"
python3 -m pip --no-cache-dir --disable-pip-version-check --quiet wheel --no-deps --wheel-dir /tmp/wheel .
"${install[@]}" /tmp/wheel/*.whl

# The base's TensorRT has a library for Triton and perhaps no bindings for Python: of the same version then.
library=$(ldconfig -p | sed -n 's/.*=> \(.*libnvinfer\.so\.[0-9]*\)$/\1/p' | head -n 1)
if [ -n "$library" ] && ! "$folder/bin/python" -c 'import tensorrt' 2>/dev/null; then
  version=$(basename "$(readlink -f "$library")" | sed 's/libnvinfer\.so\.//')
  "${install[@]}" "tensorrt-cu13-bindings==$version.*"
fi

# What is in it: CycloneDX, for scanners. (The base's own packages are in its dpkg database.)
python3 -m venv --without-pip /tmp/sbom
python3 -m pip --python /tmp/sbom/bin/python --no-cache-dir --disable-pip-version-check --quiet install cyclonedx-bom==7.5.0
/tmp/sbom/bin/cyclonedx-py environment --output-reproducible --of JSON -o "$folder/sbom.cdx.json" "$folder/bin/python"
