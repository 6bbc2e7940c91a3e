#!/usr/bin/env bash
# Run the GPU tests and benchmarks, in two calls of less than nine minutes each:
#
#     [OUT=folder] [PYTHON=python3] [NEWEST=python] [LIMIT=seconds] bash tests/gpu.sh 1
#     [OUT=folder] ... bash tests/gpu.sh 2
#     bash tests/gpu.sh tests kernels growth          # or parts by name
#
# Call 1 runs the tests and measures the training step: both sides, compiled, profiled. Call 2 runs
# what could make the step faster, an epoch of many padded sizes, and inference. Parts run in order
# of value. Each has a time limit of its own, one that fails does not stop the others, and all of
# them end LIMIT seconds after the start (call 1: 400, call 2: 360, otherwise 530). NEWEST, the
# Python of an environment with a newer PyTorch, measures the compiled step a second time.
#
# The tests and compute-sanitizer run beside each other, then the benchmarks, one by one. A benchmark
# writes its JSON file after every row, to $OUT or else to tests/benchmarks/results. bench_train.py
# adds to the train.json of the same day and machine, in $OUT or in tests/benchmarks/results: put the
# file of call 1 there before call 2. On an H200 with 16 cores the tests took 86 s, compiling a
# training step 80 s, the kernels 55 s and growth 40 s.
#
#     FCOS_TEST_DEVICE=cpu bash tests/gpu.sh
#
# runs every part in small on the CPU, kernels included, to find mistakes before a GPU does (see
# tests/device.py); its files go to a temporary folder. With FCOS_KERNELS=cupy a kernel that cannot
# run on a GPU is an error, never a fallback.
cd "$(dirname "$0")/.." || exit 2
export FCOS_KERNELS=cupy PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
newest=${NEWEST:-} small=()
train="train_eager train_compiled train_profile train_newest"
levers="train_norm train_graph train_epoch train_conv train_loss model train_autotune"
case ${1:-all} in
1) parts="tests $train" limit=${LIMIT:-400} ;;
2) parts="$levers" limit=${LIMIT:-360} ;;
all) parts="tests $train $levers train_dcn kernels growth loader" limit=${LIMIT:-530} ;;
*) parts="$*" limit=${LIMIT:-530} ;;
esac
if [ "${FCOS_TEST_DEVICE:-cuda}" = cpu ]; then
    limit=3000 small=(--small) out=$(mktemp -d)
else
    unset FCOS_TEST_DEVICE
    out=${OUT:-tests/benchmarks/results}
    "$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || {
        echo "gpu.sh: $python sees no CUDA device"
        exit 2
    }
fi
mkdir -p "$out"
if [ ! -e "$out/train.json" ] && [ -e tests/benchmarks/results/train.json ]; then
    cp tests/benchmarks/results/train.json "$out/"  # parts of the same day are added to it
fi
touch "$out/.started"
summary=$(mktemp) logs=$(mktemp -d)

part() {  # part NAME LIMIT COMMAND...
    local name=$1 most=$2 start=$SECONDS state left=$((limit - SECONDS))
    shift 2
    [ ${#small[@]} -eq 0 ] || most=900
    printf '\n==== %s\n' "$name"
    if [ "$left" -ge 15 ]; then
        # an interrupt lets pytest tell what has failed until then
        timeout --signal=INT --kill-after=8 "$((most < left ? most : left))" "$@" 2>&1 |
            tail -n 200 | cut -c -600
        state=${PIPESTATUS[0]}
    else
        echo "no time left"
        state=124
    fi
    printf '%-60s exit %3d %5d s\n' "$name" "$state" $((SECONDS - start)) >>"$summary"
}

beside() {  # beside COMMAND...: on a GPU it does not wait for what runs already
    if [ ${#small[@]} -eq 0 ]; then
        set -m  # else bash would let it ignore interrupts
        "$@" >"$(mktemp --tmpdir="$logs")" 2>&1 &
        set +m
    else
        "$@"
    fi
}

wait_for_all() {
    wait
    [ ${#small[@]} -eq 0 ] || return 0
    cat "$logs"/*
    rm -f "$logs"/*
}

bench() {  # bench NAME LIMIT ARGUMENTS...
    local name=$1 most=$2
    shift 2
    part "bench_$name $*" "$most" "$python" "tests/benchmarks/bench_$name.py" "$out" "${small[@]}" "$@"
}

tests() {  # one file by itself: a package that one lacks here must not stop another
    local file=$1 most=$2
    shift 2
    part "$file $*" "$most" "$python" -m pytest -o addopts=-ra -m gpu -v --tb=short --durations=9 \
        -o faulthandler_timeout=100 -p no:cacheprovider "tests/$file" "$@"
}

sanitize() {
    # Without PyTorch's cache every tensor is an allocation, whose ends are then guarded. PyTorch
    # asks for what may fail, such as peer access, and handles it: no error of a kernel.
    part "compute-sanitizer $1" 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool "$1" --report-api-errors no --error-exitcode 1 \
        "$python" -m pytest -o addopts= -q -p no:cacheprovider tests/test_kernels_gpu.py -k same_bits
}

for name in $parts; do
    case $name in
    tests)
        beside tests test_kernels_gpu.py 150
        beside tests test_step.py 150
        beside tests test_gpu.py 150 -k compiled_step
        beside tests test_gpu.py 150 -k "compile and not compiled_step"
        beside tests test_gpu.py 150 -k "(nccl or synchronised) and not compile"
        beside tests test_gpu.py 150 -k "not (compile or nccl or synchronised)"
        if command -v compute-sanitizer >/dev/null && [ ${#small[@]} -eq 0 ]; then
            beside sanitize memcheck
            beside sanitize racecheck
        else
            echo "no compute-sanitizer here, or no GPU"
        fi
        wait_for_all
        ;;
    train_newest)
        if [ -n "$newest" ]; then
            python=$newest bench train 120 --only compiled --name train_newest
        else
            echo "train_newest: NEWEST names no Python"
        fi
        ;;
    train_compiled) bench train 200 --only compiled ;;
    train_autotune) bench train 150 --only autotune ;;
    train_epoch) bench train 150 --only epoch ;;
    train_profile) bench train 150 --only profile ;;
    train_*) bench train 100 --only "${name#train_}" ;;
    model) bench model 120 ;;
    kernels) bench kernels 100 ;;
    growth) bench growth 60 --seconds 0.2 ;;
    loader) bench loader 30 ;;
    *) echo "gpu.sh: no part $name" ;;
    esac
done

printf '\n==== summary (exit status 0 is success, 124 the time limit)\n'
cat "$summary"
"$python" - "$out" <<'PYTHON'
import json, pathlib, sys

out = pathlib.Path(sys.argv[1])
for path in sorted(out.glob("*.json")):
    if path.stat().st_mtime < (out / ".started").stat().st_mtime:
        continue  # of another run
    record = json.loads(path.read_text())
    print(f"{path.name}: {record.get('date')} {record.get('gpu') or record.get('cpu')}")
    for row in record.get("results", []):
        numbers = {k: f"{v:.4g}" if isinstance(v, float) else f"{v}"[:160] for k, v in row.items()}
        print("  " + "  ".join(f"{k} {v}" for k, v in numbers.items() if v != "None"))
PYTHON
rm -f "$out/.started"
grep -q . "$summary" && ! grep -qv "exit   0 " "$summary"
