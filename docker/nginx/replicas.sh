#!/bin/sh
# Runs nginx before the replicas that are ready: replicas.sh nginx -c /etc/nginx/nginx.conf
#
# Once a second it looks them up and, where they have changed, writes nginx's list and lets nginx read it; calls in
# flight are answered meanwhile. Where nothing is found, nginx keeps those that it had.
#
#   REPLICAS       the name that stands for all of them (serve: the headless Service, whose pods are ready)
#   REPLICAS_PORT  their port (8001)
#   LOOKUP         another command that prints an address, or address:port, a line
set -eu
name=${REPLICAS:-serve} port=${REPLICAS_PORT:-8001} file=${REPLICAS_FILE:-/tmp/replicas.conf}

look() { # prints nginx's lines, in an order that is always the same
  if [ -n "${LOOKUP:-}" ]; then sh -c "$LOOKUP"; else getent ahosts "$name"; fi |
    awk -v port="$port" 'NF { a = $1; if (a !~ /^[^:]+:[0-9]+$|^\[.*\]:/) a = (a ~ /:/ ? "[" a "]" : a) ":" port
      print "server " a " max_fails=1 fail_timeout=1s;" }' | sort -u
}

found=$(look 2>/dev/null || true)
# An upstream without a server is an error; one that is down answers "no replica"
printf '%s\n' "${found:-server 127.0.0.1:9 down;}" >"$file"
"$@" -g 'daemon off;' &
nginx=$!
trap 'kill -QUIT $nginx 2>/dev/null || true; wait $nginx; exit 0' TERM INT QUIT

while kill -0 $nginx 2>/dev/null; do
  sleep 1 &
  wait $! || true
  next=$(look 2>/dev/null || true)
  [ -n "$next" ] && [ "$next" != "$found" ] || continue
  found=$next
  printf '%s\n' "$found" >"$file.new" && mv "$file.new" "$file"
  kill -HUP $nginx
  echo "replicas: $(printf '%s\n' "$found" | awk '{ printf "%s ", $2 }')" >&2
done
wait $nginx
