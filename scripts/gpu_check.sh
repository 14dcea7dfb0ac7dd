#!/usr/bin/env bash
# The gpu tests and all benchmarks, on a machine with a GPU and a checkout: scripts/gpu_check.sh [--dry-run]
#
# Records and logs go to $OUT (default benchmarks/results), a summary comes last, and the exit status is the tests'.
# Every stage has its own limit in seconds, 9 minutes in all, so that one that hangs costs no more than its share.
# $PYTHON is the interpreter (default python3); nothing has to be installed but torch, triton and pytest.
set -u -o pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python3}
export PYTHONPATH="src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Products by cuBLAS are deterministic with it only.
export CUBLAS_WORKSPACE_CONFIG=:4096:8

case "${1:-}" in
    "") dry_run=no ;;
    --dry-run) dry_run=yes ;;
    *) echo "Unknown argument '$1': only --dry-run, which shows the stages and runs none." >&2; exit 2 ;;
esac

ours='["two SDPA calls", "dense", "twicing: triton, order 1", "twicing: triton"]'
shapes='["1024x3x197x64", "1024x3x256x64", "8x32x1024x64-causal", "8x32x1024x64", "8x32x4096x64-causal", "8x32x4096x64"'
shapes+=', "8x32x16384x64-causal", "8x32x16384x64"]'
summary=()

# limited NAME SECONDS COMMAND...: run it with a limit, and keep its output in $OUT/NAME.log.
limited() {
    local name=$1 limit=$2
    shift 2
    if [ "$dry_run" = yes ]; then
        printf '%s\t%s\t' "$name" "$limit"
        printf '%q ' "$@"
        printf '\n'
        return 0
    fi
    echo "== $name (at most $limit s)"
    # SIGINT first: a benchmark that is told to stop keeps the rows it has finished.
    timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    return "${PIPESTATUS[0]}"
}

# remember NAME SECONDS STATUS STARTED: how a stage ended, for the summary.
remember() {
    local name=$1 limit=$2 status=$3 started=$4
    case $status in
        0) summary+=("$name: passed, $((SECONDS - started)) s") ;;
        124 | 137) summary+=("$name: stopped at its limit of $limit s") ;;
        *) summary+=("$name: failed with status $status, $((SECONDS - started)) s") ;;
    esac
}

bench() {
    local name=bench-$1 limit=$2 started=$SECONDS
    limited "$name" "$limit" "$PYTHON" -m twicing.experiments.bench "$1" "$3"
    remember "$name" "$limit" $? "$started"
}

# The tests side by side, in four parts that leave out none: nearly all of their time goes into compiling the kernels,
# some hundred of them, of which a process compiles one after the other.
gpu_tests() {
    local limit=$1 started=$SECONDS pids=() part status worst=0
    local parts=("blocks and causal" "blocks and not causal" "not blocks and causal" "not blocks and not causal")
    for part in "${!parts[@]}"; do
        # Warnings stay warnings: the versions here are not those that the project is developed with.
        limited "gpu-tests-$((part + 1))" "$limit" "$PYTHON" -m pytest -m gpu tests/gpu -k "${parts[part]}" \
            -q -p no:cacheprovider -o filterwarnings=default &
        pids+=($!)
        # One after the other where nothing is run, so that the lines come in order.
        [ "$dry_run" = no ] || wait $!
    done
    for part in "${!parts[@]}"; do
        wait "${pids[part]}"
        status=$?
        remember "gpu-tests-$((part + 1))" "$limit" "$status" "$started"
        [ "$status" = 0 ] || worst=$status
    done
    return "$worst"
}

[ "$dry_run" = yes ] || mkdir -p "$OUT" || exit 2

gpu_tests 210
tests=$?
bench ops 200 "{\"device\": \"cuda\", \"dtype\": \"bfloat16\", \"seconds\": 0.3, \"out\": \"$OUT\", \"contenders\": $ours, \"shapes\": $shapes}"
bench decode 45 "{\"device\": \"cuda\", \"dtype\": \"bfloat16\", \"seconds\": 0.2, \"out\": \"$OUT\"}"
bench model 75 "{\"device\": \"cuda\", \"dtype\": \"bfloat16\", \"backends\": [\"triton\", \"sdpa\"], \"batch\": 256, \"seconds\": 1.5, \"out\": \"$OUT\"}"

if [ "$dry_run" = no ]; then
    echo "== summary"
    printf '%s\n' "${summary[@]}"
    echo "Records and logs: $OUT"
fi
exit "$tests"
