#!/usr/bin/env bash
# Everything that needs a GPU, in one run of less than nine minutes:
#
#     [OUT=folder] [PYTHON=python3] bash tests/gpu.sh
#
# Each part has its own time limit, and one that fails does not stop the others; all of them end 530
# seconds after the start. Results in JSON go to $OUT, or else to tests/benchmarks/results.
# FCOS_KERNELS=cupy: no fallback can pass for a kernel.
cd "$(dirname "$0")/.." || exit 2
export FCOS_KERNELS=cupy
python=${PYTHON:-python3}
out=${OUT:-tests/benchmarks/results}
mkdir -p "$out"
"$python" -c "import sys, torch; sys.exit(not torch.cuda.is_available())" || {
    echo "gpu.sh: $python sees no CUDA device"
    exit 2
}
names=() states=() seconds=()

part() {  # part NAME LIMIT COMMAND...
    local name=$1 limit=$2 start=$SECONDS state left=$((530 - SECONDS))
    shift 2
    printf '\n==== %s\n' "$name"
    if [ "$left" -ge 20 ]; then
        timeout --kill-after=5 "$((limit < left ? limit : left))" "$@" 2>&1 | tail -n 60
        state=${PIPESTATUS[0]}
    else
        echo "no time left"
        state=124
    fi
    names+=("$name") states+=("$state") seconds+=($((SECONDS - start)))
}

# Only files with such tests, each by itself: a package that one lacks here must not stop another.
for file in $(grep -l 'pytest\.mark\.gpu' tests/test_*.py); do
    part "${file#tests/}" 120 "$python" -m pytest -m gpu -q --durations=5 "$file"
done
part "benchmark of the kernels" 170 "$python" tests/benchmarks/bench_kernels.py "$out"
if [ -e tests/benchmarks/bench_model.py ]; then
    part "benchmark of the model" 160 "$python" tests/benchmarks/bench_model.py "$out"
fi
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        # Without PyTorch's cache every tensor is an allocation, whose ends are then guarded.
        part "compute-sanitizer $tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$python" -m pytest -q tests/test_kernels_gpu.py -k same_bits
    done
fi

printf '\n==== summary (exit status 0 is success, 124 the time limit)\n'
failures=0
for i in "${!names[@]}"; do
    printf '%-32s exit %3d %5d s\n' "${names[i]}" "${states[i]}" "${seconds[i]}"
    [ "${states[i]}" -eq 0 ] || failures=$((failures + 1))
done
"$python" - "$out" <<'PYTHON'
import json, pathlib, sys

for path in sorted(pathlib.Path(sys.argv[1]).glob("*.json")):
    try:
        record = dict(json.loads(path.read_text()))
    except (TypeError, ValueError) as error:
        print(f"{path.name}: {error}")
        continue
    print(f"{path.name}: {record.get('date')} {record.get('gpu')}")
    for row in record.get("results", []):
        numbers = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        print("  " + "  ".join(f"{k} {v}" for k, v in numbers.items() if v is not None))
PYTHON
exit "$failures"
