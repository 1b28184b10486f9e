#!/usr/bin/env bash
# Runs a test where a GPU is, and skips it with a sentence elsewhere.
# usage: on_gpu.sh [--mps] PROGRAM [ARGUMENT...]
#   --mps   under an MPS server of its own, in folders of its own: one that the machine runs is neither used nor touched.
#           Fails if the program did not come to that server.
set -u

skip() {
    if [ "${CMOCKA_MESSAGE_OUTPUT:-}" = TAP ]; then
        echo "1..0 # SKIP $1"
        exit 0
    fi
    echo "$1: nothing was checked"
    exit 77
}

mps=no
if [ "${1:-}" = --mps ]; then
    mps=yes
    shift
fi
[ $# -gt 0 ] || { sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2; }

compgen -G '/dev/nvidia[0-9]*' >/dev/null || skip "no CUDA device"
[ $mps = yes ] || exec "$@"

command -v nvidia-cuda-mps-control >/dev/null || skip "no nvidia-cuda-mps-control"
folder=$(mktemp -d /tmp/pivotkv-mps-XXXXXX) || exit 1
export CUDA_MPS_PIPE_DIRECTORY=$folder/pipe CUDA_MPS_LOG_DIRECTORY=$folder/log
mkdir "$CUDA_MPS_PIPE_DIRECTORY" "$CUDA_MPS_LOG_DIRECTORY"

ask() {
    echo "$*" | timeout 20 nvidia-cuda-mps-control
}

end() {
    local pid
    pid=$(cat "$CUDA_MPS_PIPE_DIRECTORY/nvidia-cuda-mps-control.pid" 2>/dev/null)
    ask quit >/dev/null 2>&1
    for _ in $(seq 50); do
        [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null || break
        sleep 0.1
    done
    [ -n "$pid" ] && kill -KILL "$pid" 2>/dev/null
    rm -rf "$folder"
}
trap end EXIT

timeout 20 nvidia-cuda-mps-control -d >"$folder/start" 2>&1 || skip "no MPS server may be started: $(tail -n 1 "$folder/start")"
"$@"
rc=$?
servers=$(ask get_server_list)
if [ -z "$servers" ]; then
    echo "# no process came to the MPS server"
    [ $rc -ne 0 ] || rc=1
fi
if [ $rc -ne 0 ]; then
    tail -n 20 "$CUDA_MPS_LOG_DIRECTORY"/*.log | sed 's/^/# /'
fi
exit $rc
