#!/usr/bin/env bash
# `make images`: builds both images and tries them, as root on a Debian machine, without Docker and without an
# official base. The stand-in base is Debian 12 with Python 3.11, and for `serve` the tritonserver of
# nvidia-pytriton laid out as /opt/tritonserver: for tests, on loopback only. What is tried inside runs as uid
# 1000, on a read-only root, without capabilities: a shop, a build of it, a server, a list.
#
#   docker/images.sh [build|try]      both if nothing is said
# The store is .build/images (PEREGRINE_IMAGES names another); the base is made once.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${PEREGRINE_IMAGES:-$PWD/.build/images}
mkdir -p "$folder"

fail() {
  echo "error: $*" >&2
  exit 2
}
[ "$(id -u)" = 0 ] || fail "images are built and tried as root: namespaces, chroot"
for tool in buildah debootstrap setpriv unshare; do
  command -v $tool >/dev/null || fail "$tool is not installed; cure: apt-get install buildah debootstrap util-linux"
done

# overlay where the kernel has it for us; vfs copies every layer, and works anywhere.
driver=overlay
[ -f "$folder/driver" ] && driver=$(cat "$folder/driver")
store() { buildah --root "$folder/store" --runroot "$folder/run" --storage-driver "$driver" "$@"; }
if [ ! -f "$folder/driver" ]; then
  container=$(store from scratch 2>/dev/null && true) && store mount "$container" >/dev/null 2>&1 || driver=vfs
  store rm --all >/dev/null 2>&1 || true
  echo $driver >"$folder/driver"
fi

timed() { # NAME COMMAND…: runs it and says how long it took
  local name=$1 start_s=$SECONDS
  shift
  "$@" >"$folder/$name.log" 2>&1 || { tail -n 25 "$folder/$name.log" >&2; fail "$name failed; its log: $folder/$name.log"; }
  echo "$name: $((SECONDS - start_s)) s"
}

make_root() { # Debian as a tree; kept, since it takes minutes
  [ -f "$folder/root.tar" ] && return
  rm -rf "$folder/root"
  # Where this machine's own packages come from, unless another is named.
  local mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null | awk '!/security/ && !n++' || true)}
  debootstrap --variant=minbase --include=python3,python3-pip,libpython3.11,ca-certificates bookworm "$folder/root" ${mirror:+"$mirror"}
  rm -rf "$folder"/root/var/cache/apt/* "$folder"/root/var/lib/apt/lists/*
  tar -C "$folder/root" -cf "$folder/root.tar.new" .
  mv "$folder/root.tar.new" "$folder/root.tar"
  rm -rf "$folder/root"
}

make_bases() { # localhost/peregrine-test-base:python, and :triton with a tritonserver in it
  local container triton site
  container=$(store from scratch)
  store add "$container" "$folder/root.tar" /
  store commit --quiet --rm "$container" localhost/peregrine-test-base:python
  [ -x .venv/bin/python ] || fail "the tritonserver of the test base comes from .venv; cure: make install"
  site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  triton=$folder/tritonserver
  rm -rf "$triton"
  mkdir -p "$triton/lib"
  cp -r "$site"/pytriton/tritonserver/{bin,backends,caches} "$triton/"
  cp "$site"/pytriton/tritonserver/python_backend_stubs/3.11/triton_python_backend_stub "$triton/backends/python/"
  cp "$site"/nvidia_pytriton.libs/* "$triton/lib/"
  echo 2.51.0 >"$triton/TRITON_VERSION"
  container=$(store from localhost/peregrine-test-base:python)
  store copy --quiet "$container" "$triton" /opt/tritonserver
  store config --env LD_LIBRARY_PATH=/opt/tritonserver/lib --label peregrine.test-base=loopback-only "$container"
  store commit --quiet --rm "$container" localhost/peregrine-test-base:triton
  rm -rf "$triton"
}

make_image() { # NAME BASE [ARGUMENT…]: builds docker/NAME.Dockerfile
  local name=$1 base=$2 volumes=() path
  shift 2
  # This machine's pip, with the wheels that it is told of; nothing of that gets into a layer.
  for path in /etc/pip.conf $(pip config debug 2>/dev/null | sed -n 's/^ *\(.*pip\.conf\), exists: True$/\1/p'); do
    [ -f "$path" ] && volumes=(--volume "$path:/etc/pip.conf:ro")
  done
  for path in ${PIP_FOLDERS:-$(ls -d /opt/wheels /opt/pypi /opt/pypi-more 2>/dev/null || true)}; do
    volumes+=(--volume "$path:$path:ro")
  done
  [ -f /etc/ssl/certs/ca-certificates.crt ] && volumes+=(--volume /etc/ssl/certs/ca-certificates.crt:/etc/ssl/certs/ca-certificates.crt:ro)
  store bud --isolation chroot --format docker --pull-never --layers=false "${volumes[@]}" --build-arg BASE="$base" \
    --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || echo unknown)" "$@" \
    --tag "localhost/peregrine-$name" --file "docker/$name.Dockerfile" .
}

in_image() { # NAME MEGABYTES_OF_SHM COMMAND…: runs it in an image as a strict pod would
  local name=$1 shm=$2 container root environment
  shift 2
  container=$(store from --pull-never "localhost/peregrine-$name")
  root=$(store mount "$container")
  environment=$(store inspect --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' "$container")
  local status=0
  unshare --mount --pid --fork --kill-child bash -euo pipefail -s -- "$root" "$folder/volumes" "$shm" "$environment" "$@" <<'INSIDE' || status=$?
root=$1 volumes=$2 shm=$3 environment=$4
shift 4
mount --make-rprivate /
mount --bind "$root" "$root"
for name in releases catalogue state shops; do
  mkdir -p "$root/$name" && mount --bind "$volumes/$name" "$root/$name"
done
mount --rbind /dev "$root/dev" && mount -t tmpfs -o "size=${shm}m,mode=1777" shm "$root/dev/shm"
mount -t proc proc "$root/proc"
mount -t tmpfs -o size=256m,mode=1777 tmp "$root/tmp"
mount -o remount,ro,bind "$root"
mapfile -t variables <<<"$environment"
exec chroot "$root" /usr/bin/setpriv --reuid=1000 --regid=1000 --clear-groups --inh-caps=-all --bounding-set=-all \
  --no-new-privs /usr/bin/env -i "${variables[@]}" "$@" </dev/null
INSIDE
  store rm "$container" >/dev/null
  return $status
}

# --- what is tried inside

BUILD='
set -e
peregrine shop generate /shops/demo --users 1200 --items 400 --events 30000 --seed 1
OMP_NUM_THREADS=1 peregrine build /shops/demo --preset tiny --repository /releases
'
SERVE='
set -e
peregrine release activate r1 --repository /releases
# 2.51 must stay on loopback, which the default of the image does not
peregrine serve --repository /releases --state /state/serve --http-port 8080 >/tmp/serve.log 2>&1 &
server=$!
for i in $(seq 240); do
  "$@" >/dev/null 2>&1 && break
  kill -0 $server 2>/dev/null || { cat /tmp/serve.log >&2; exit 1; }
  sleep .5
done
"$@" || { cat /tmp/serve.log >&2; exit 1; }
peregrine recommend u1 --top-k 3
kill -TERM $server
wait $server
'
STRICT='
grep -E "^(Uid|Cap(Eff|Prm|Bnd|Amb)|NoNewPrivs)" /proc/self/status | tr "\\n\\t" "  "; echo
for path in / /etc /opt/peregrine /usr; do touch $path/x 2>/dev/null && { echo "$path can be written to" >&2; exit 1; }; done
for tool in gcc cc g++ make pip; do [ -x /opt/peregrine/bin/$tool ] && { echo "$tool is in the image" >&2; exit 1; }; done
[ -z "$(find / -xdev \( -path "*/.cache/pip" -o -path "*/__pycache__/*.pyc" -path "/opt/peregrine/*" \) -print -quit 2>/dev/null)" ]
test -s /opt/peregrine/sbom.cdx.json
'

build_all() {
  timed root make_root
  timed bases make_bases
  timed serve-image make_image serve localhost/peregrine-test-base:triton --build-arg LOCK=serve-py311.lock
  timed build-image make_image build localhost/peregrine-test-base:python
  store images --format 'localhost/{{.Name}}:{{.Tag}} {{.Size}}' | grep peregrine | sed 's/^localhost.localhost/localhost/'
}

try_all() {
  local name health=()
  rm -rf "$folder/volumes"
  for name in releases catalogue state shops; do
    mkdir -p "$folder/volumes/$name" && chown 1000:1000 "$folder/volumes/$name"
  done
  for name in build serve; do
    echo "peregrine-$name: $(in_image $name 8 bash -c "$STRICT")"
  done
  timed build in_image build 64 bash -c "$BUILD"
  # The image's own HEALTHCHECK is what says that it is up.
  mapfile -t health < <(store inspect --type image --format '{{range .Docker.Config.Healthcheck.Test}}{{println .}}{{end}}' \
    localhost/peregrine-serve | sed '1d;/^$/d')
  timed serve in_image serve 256 bash -c "$SERVE" serve "${health[@]}"
  sed 's/^/  /' "$folder/serve.log"
}

case ${1:-all} in
  build) build_all ;;
  try) try_all ;;
  all) build_all && try_all ;;
  *) fail "it knows build and try, not $1" ;;
esac
