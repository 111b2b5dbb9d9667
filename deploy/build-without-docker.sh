#!/usr/bin/env bash
# Builds images without Docker and without a registry, and tries them: a gateway and a worker from theirs, each as the
# image's own user on a read-only root, make a picture with the fake engine. buildah builds them on a small Debian that
# mmdebstrap makes in place of python:slim; Valkey comes from .venv (make setup).
#
#   sudo deploy/build-without-docker.sh [FOLDER]     default: .cache/images; a second run takes what is there
#
# Needs root, and Debian's packages buildah, mmdebstrap and jq. Where overlays cannot be mounted, STORAGE_DRIVER=vfs does
# without, and takes several times as long and 9 GB.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(realpath -m "${1:-.cache/images}")
port=${PORT:-18000}
export BUILDAH_ISOLATION=chroot
mkdir -p "$work"

# --- build ---------------------------------------------------------------------------------------------------------

with_store() { # buildah COMMAND…, with everything below $work
  buildah --root "$work/storage" --runroot "$work/run" ${STORAGE_DRIVER:+--storage-driver "$STORAGE_DRIVER"} "$@"
}

make_base() { # what python:slim has, as far as the images use it
  [ -s "$work/base.tar" ] || mmdebstrap --variant=minbase --include=ca-certificates,python3,python3-pip,python3-venv \
    bookworm "$work/base.tar"
  local container
  container=$(with_store from scratch)
  with_store add --quiet "$container" "$work/base.tar" / >/dev/null
  with_store commit --quiet --rm "$container" localhost/python-standin >/dev/null
}

build() { # IMAGE DOCKERFILE [OPTION…]; with this machine's certificates, in case its network has some of its own
  local image=$1 dockerfile=$2
  shift 2
  with_store build --layers --format docker --file "deploy/$dockerfile" --tag "$image" "$@" \
    --build-arg PYTHON_IMAGE=localhost/python-standin --volume /etc/ssl/certs:/etc/ssl/certs:ro .
}

with_store inspect --type image localhost/python-standin >/dev/null 2>&1 || make_base
build img2img-gateway gateway.Dockerfile
build img2img-worker:proxy worker.Dockerfile --target proxy

# --- try -----------------------------------------------------------------------------------------------------------

processes=()
stop() { # newest first, like whoever stops containers
  local index
  for ((index = ${#processes[@]} - 1; index >= 0; index--)); do
    kill "${processes[index]}" 2>/dev/null || true
    wait "${processes[index]}" || true
  done
  processes=()
}
unmount() { # what buildah leaves mounted of its store, so that the folder can be deleted
  awk -v below="$work/storage/" 'index($2, below) == 1 { print $2 }' /proc/mounts | sort --reverse |
    xargs --no-run-if-empty umount
}
trap "stop; unmount" EXIT

unpack() { # IMAGE: its files and its configuration below $work/IMAGE
  local folder=$work/${1/:/-} container
  rm -rf "$folder"
  mkdir "$folder"
  container=$(with_store from "$1")
  cp --archive "$(with_store mount "$container")" "$folder/root"
  with_store inspect --type image "$1" | jq .Docker.config >"$folder/config.json"
  with_store rm "$container" >/dev/null
}

run_image() { # IMAGE [VARIABLE=VALUE…] [-- ARGUMENT…]: as a container would, but for the network
  local folder=$work/${1/:/-} variables=() arguments=()
  shift
  mapfile -t variables < <(jq -r '.Env[]' "$folder/config.json")
  mapfile -t arguments < <(jq -r '.Cmd[]' "$folder/config.json")
  while (($#)) && [ "$1" != -- ]; do
    variables+=("$1")
    shift
  done
  if (($#)); then
    shift
    arguments=("$@")
  fi
  mapfile -t entry < <(jq -r '.Entrypoint[]' "$folder/config.json")
  # shellcheck disable=SC2016 # the inner shell's variables
  exec unshare --mount sh -euc '
    root=$1 user=$2
    shift 2
    mount --bind "$root" "$root"
    mount --rbind /dev "$root/dev"
    mount -t proc proc "$root/proc"
    mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"
    mount -t tmpfs -o mode=0700,uid="${user%:*}",gid="${user#*:}" tmpfs "$root/cache"
    mount -o remount,bind,ro "$root"
    exec chroot --userspec="$user" "$root" "$@"
  ' sh "$folder/root" "$(jq -r .User "$folder/config.json")" \
    env --ignore-environment --chdir "$(jq -r .WorkingDir "$folder/config.json")" "${variables[@]}" "${entry[@]}" "${arguments[@]}"
}

await() { # SECONDS WHAT COMMAND…: until the command succeeds
  local deadline=$((SECONDS + $1)) what=$2
  shift 2
  until "$@" >/dev/null 2>&1; do
    if ((SECONDS > deadline)); then
      echo "not within its time: $what" >&2
      cat "$work"/*.log >&2
      exit 1
    fi
    sleep 0.2
  done
}

unpack img2img-gateway
unpack img2img-worker:proxy
valkey=$(.venv/bin/python -c 'from img2img.embedded import find_binary; print(find_binary())')
common=(IMG2IMG_REDIS_URL=redis://127.0.0.1:$((port + 1))/0 IMG2IMG_LOG_FORMAT=json)

"$valkey" --port $((port + 1)) --bind 127.0.0.1 --save '' --dir "$work" >"$work/valkey.log" 2>&1 &
processes+=($!)
run_image img2img-gateway "${common[@]}" IMG2IMG_HOST=127.0.0.1 IMG2IMG_HTTP_PORT="$port" \
  IMG2IMG_GRPC_PORT=$((port + 2)) >"$work/gateway.log" 2>&1 &
processes+=($!)
await 30 "the gateway's /health/live" curl --fail --silent "http://127.0.0.1:$port/health/live"
echo "gateway: /health/live answers $(curl --silent "http://127.0.0.1:$port/health/live")"

run_image img2img-worker:proxy "${common[@]}" IMG2IMG_ENGINE=fake \
  IMG2IMG_METRICS_PORT=$((port + 3)) >"$work/worker.log" 2>&1 &
processes+=($!)
await 30 "the worker's /health/ready" curl --fail --silent "http://127.0.0.1:$((port + 3))/health/ready"
echo "worker: /health/ready answers $(curl --silent "http://127.0.0.1:$((port + 3))/health/ready")"
await 30 "the gateway's /health/ready" curl --fail --silent "http://127.0.0.1:$port/health/ready"
curl --fail --silent --output "$work/picture.png" \
  "http://127.0.0.1:$port/client/v4/accounts/local/ai/run/@cf/runwayml/stable-diffusion-v1-5-img2img" \
  --data '{"prompt": "a lion"}'
echo "worker: made $(head --bytes 4 "$work/picture.png" | tail --bytes 3) of $(stat --format %s "$work/picture.png") bytes"

for process in "${processes[@]:1}"; do
  grep --quiet '^[^ ]* / [^ ]* ro,' "/proc/$process/mounts" || { echo "$process has a root that it may write to" >&2 && exit 1; }
  [ "$(stat --format %u:%g "/proc/$process")" = 10001:10001 ] || { echo "$process is not user 10001" >&2 && exit 1; }
done
echo "both: user 10001:10001, read-only root"
stop
for program in gateway worker; do
  grep --quiet "${program}_stopped" "$work/$program.log" && echo "$program: ended in order on SIGTERM"
done
for image in img2img-gateway img2img-worker-proxy; do
  echo "$image: $(du --summarize --block-size=MB "$work/$image/root" | cut --fields 1)"
done
