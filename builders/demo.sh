#!/usr/bin/env bash
# The demo, as a newcomer would type it: a shop, a release of it and what it is worth, a server, three lists.
# `make demo` and `make bench` run it.
# Run again it is quick: the shop and every stage of the build that is unchanged are kept in demo/.
set -euo pipefail
cd "$(dirname "$0")/.."

export PATH="$PWD/.venv/bin:$PATH"
# The demo is for a machine of one's own. Elsewhere `peregrine serve` wants an ordinary user.
export PEREGRINE_AS_ROOT=1
SHOP=demo/shop
REPOSITORY=demo/model_repository
LOG=demo/serve.log
START_S=$SECONDS
# The demo's tensors are small: a second thread gains nothing on an idle machine, and on a busy one it makes
# training ten times slower.
export OMP_NUM_THREADS=1

show() { # prints a command, then runs it
  printf '\n\033[1m$ %s\033[0m\n' "$*"
  "$@"
}

make_release() {
  mkdir -p demo
  [ -f $SHOP/shop.toml ] || show peregrine shop generate $SHOP --users 3000 --items 1000 --events 120000
  if [ ! -f $REPOSITORY/recommend/config.pbtxt ]; then
    show peregrine build $SHOP --preset tiny --repository $REPOSITORY --activate
  fi
}

start_server() { # in the background, on a free port; `peregrine recommend` finds it through the repository
  printf '\n\033[1m$ peregrine serve --repository %s --port 0 --metrics-port 0 &\033[0m\n' $REPOSITORY
  : >$LOG
  peregrine serve --repository $REPOSITORY --port 0 --metrics-port 0 >>$LOG 2>&1 &
  SERVER=$!
  trap stop_server EXIT
  until grep -q '^serving release' $LOG; do
    kill -0 $SERVER 2>/dev/null || { cat $LOG >&2; exit 2; }
    sleep 0.1
  done
  sed '/^  try /d; /^Ctrl-C/d' $LOG
}

stop_server() { # SIGTERM: what is in flight is answered, and nothing stays behind
  trap - EXIT
  if kill -TERM $SERVER 2>/dev/null; then
    wait $SERVER && echo "the server has stopped"
  fi
}

time_requests() { # the calls above opened a connection each; an application keeps one
  python - $REPOSITORY <<'END'
import sys
from pathlib import Path

from clients import Client
from ensemble.server.running import running_server

with Client(running_server(Path(sys.argv[1])).url) as client:
    for at in range(20):  # each process of each step answers its first request slowly
        client.recommend(f"u{1 + at}")
    times_ms = sorted(client.recommend(f"u{21 + at}").latency_ms for at in range(300))
print(f"\n300 more requests, one after another over one connection: p50 {times_ms[150]:.1f} ms, p99 {times_ms[297]:.1f} ms")
END
}

demo() {
  make_release
  show peregrine report --repository $REPOSITORY --out demo/report.html
  start_server
  show peregrine recommend u1 u2 --top-k 5 --repository $REPOSITORY
  show peregrine recommend newcomer --session i1,i2 --top-k 5 --repository $REPOSITORY
  if [ -f $REPOSITORY/search/config.pbtxt ]; then # where the encoders' packages are installed
    show peregrine search "matte berry lipstick" --user u1 --top-k 5 --repository $REPOSITORY
    show peregrine search --user u1 --image "$(find $SHOP/images -type f | sort | head -1)" --top-k 5 --repository $REPOSITORY
    show peregrine recommend u1 --like i3 --top-k 5 --repository $REPOSITORY
  fi
  time_requests
  stop_server
  cat <<END

Done in $((SECONDS - START_S)) s. To go on:
  . .venv/bin/activate
  peregrine serve --repository $REPOSITORY           # then, in another terminal:
  peregrine recommend u42 --repository $REPOSITORY   # any of u1 … u3000
  make bench                                                   # what an answer costs
  README.md, "Your own shop", says how to do this with your data
END
}

bench() {
  make_release
  start_server
  show peregrine bench --repository $REPOSITORY --json demo/bench.json --plot demo/bench.png
  stop_server
}

case "${1:-}" in
  demo | bench) "$1" ;;
  *) echo "usage: builders/demo.sh demo | bench" >&2; exit 2 ;;
esac
