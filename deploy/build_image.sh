#!/bin/sh
# Builds the `cpu` image with buildah, runs it with podman and checks it: read-only root, user, no compiler, health, a
# chat, a drain with a stream in progress, size. Ends with status 0 and the line "image ok" when all of it holds.
#
# For machines without Docker; run as root. What the machine needs beyond the Dockerfile comes in by the environment:
#   IMAGE         name to give (default localhost/spq-serve:cpu)
#   PYTHON_IMAGE  base image, such as a stand-in where no registry can be reached
#   BUILD_FLAGS   more arguments of `buildah bud`, such as --volume FILE:/etc/pip.conf:ro for an index of your own
#   RUN_FLAGS     more arguments of `podman run`
#   PORT          where the container listens, on this machine's loopback (default 8123)
#   SKIP_BUILD=1  check an image that is there
#   MAX_BYTES     size at most (default 1.5 GB, what the README says)
set -eu
cd "$(dirname "$0")/.."
IMAGE=${IMAGE:-localhost/spq-serve:cpu}
PORT=${PORT:-8123}
MAX_BYTES=${MAX_BYTES:-1500000000}
NAME=spq-image-check
URL=http://127.0.0.1:$PORT
work=$(mktemp -d)
trap 'podman rm --force --time 1 "$NAME" >/dev/null 2>&1 || true; rm -rf "$work"' EXIT

say() { echo "$(date -u +%H:%M:%S) $*"; }
fail() {
    say "FAILED: $*" >&2
    podman logs "$NAME" 2>&1 | tail -20 >&2 || true
    exit 1
}

if [ -z "${SKIP_BUILD:-}" ]; then
    # --format docker: the OCI format has no field for HEALTHCHECK
    # shellcheck disable=SC2086  # flags are words
    buildah bud --layers --format docker --isolation chroot --network host --target cpu \
        ${PYTHON_IMAGE:+--build-arg "PYTHON_IMAGE=$PYTHON_IMAGE"} ${BUILD_FLAGS:-} --tag "$IMAGE" .
fi

# shellcheck disable=SC2086
podman run --detach --name "$NAME" --network host --read-only --tmpfs /tmp --cap-drop all \
    --security-opt no-new-privileges --env SPQ_HOST=127.0.0.1 --env "SPQ_PORT=$PORT" ${RUN_FLAGS:-} "$IMAGE" >/dev/null
say "started"

[ "$(podman exec "$NAME" id -u)" = 10001 ] || fail "the server's user is not 10001"
! podman exec "$NAME" sh -c 'command -v cc gcc clang tcc g++' || fail "there is a compiler in the image"
! podman exec "$NAME" touch /opt/venv/written 2>/dev/null || fail "the root file system can be written"

tries=0
until podman healthcheck run "$NAME" >/dev/null 2>&1; do
    tries=$((tries + 1))
    [ "$(podman inspect --format '{{.State.Running}}' "$NAME")" = true ] || fail "the server ended"
    [ "$tries" -lt 180 ] || fail "not healthy after six minutes"
    sleep 2
done
say "healthy: $(podman exec "$NAME" python /opt/spq/healthcheck.py)"
podman logs "$NAME" 2>&1 | grep -F 'backend native' >/dev/null || fail "the C kernels are not used"

chat='{"messages": [{"role": "user", "content": "The captain looked at the sea and said,"}], "model": "storyteller", "temperature": 0'
curl --fail --silent --show-error "$URL/v1/chat/completions" -H 'Content-Type: application/json' \
    -d "$chat, \"max_tokens\": 12}" > "$work/chat" || fail "no answer to a chat"
grep -F '"completion_tokens":12' "$work/chat" >/dev/null || fail "a chat of other length: $(cat "$work/chat")"
say "chat: $(cat "$work/chat")"

# The drain: a stream that has begun is finished after SIGTERM, and only then does the server leave, with status 0.
# 32 answers in it, so that it takes seconds.
curl --silent --no-buffer "$URL/v1/chat/completions" -H 'Content-Type: application/json' \
    -d "$chat, \"n\": 32, \"max_tokens\": 900, \"ignore_eos\": true, \"stream\": true}" > "$work/stream" &
client=$!
until grep -q delta "$work/stream" 2>/dev/null; do
    kill -0 "$client" 2>/dev/null || fail "the stream ended at once: $(cat "$work/stream")"
    sleep 0.1
done
! grep -F 'data: [DONE]' "$work/stream" >/dev/null || fail "the stream was over before the stop, so it shows nothing"
before=$(grep -c delta "$work/stream")
podman stop --time 40 "$NAME" >/dev/null
wait "$client" || fail "the stream broke off"
tail -c 100 "$work/stream" | grep -F 'data: [DONE]' >/dev/null || fail "the drain cut the stream"
status=$(podman inspect --format '{{.State.ExitCode}}' "$NAME")
[ "$status" = 0 ] || fail "status $status after the drain"
say "drained: $before of $(grep -c delta "$work/stream") chunks had come when SIGTERM was sent; status 0"

size=$(podman image inspect --format '{{.Size}}' "$IMAGE")
[ "$size" -le "$MAX_BYTES" ] || fail "$size bytes; the README says at most $MAX_BYTES"
say "size: $size bytes"
podman history --human=false --format '{{.Size}} {{.CreatedBy}}' "$IMAGE" | cut -c 1-100 | grep -v '^0 '
echo "image ok"
