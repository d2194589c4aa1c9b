#!/bin/bash
# The tests and both benches on one GPU, in parts of at most ten minutes each:
#
#     bash experiments/gpu.sh FOLDER [PART ...]     # FOLDER: by default $OUT, else ./gpu
#
#     kernel        tests of the kernels, but those of Triton's interpreter
#     kernel-bench  bench_kernel.py: the table of kernels/README.md
#     stages        tests/test_cuda.py: the stages on the GPU beside the same on the CPU
#     bench         bench.py: sampling and the update at 0.5B beside plain ways
#
# The kernel comes first and alone, because all else builds on it. Every part writes FOLDER/PART.log
# as it goes, so that a part that is cut short leaves what it has; the benches write JSON besides.
cd "$(dirname "$0")/.." || exit 1
folder=${1:-${OUT:-gpu}}
parts=("${@:2}")
[ ${#parts[@]} -gt 0 ] || parts=(kernel kernel-bench stages bench)
mkdir -p "$folder" || exit 1
failed=()

part() {  # NAME COMMAND...: run it for ten minutes at most and say how it ended
  local name=$1 start=$SECONDS code=0
  shift
  timeout --kill-after=10 580 "$@" > "$folder/$name.log" 2>&1 || code=$?
  echo "$name: exit status $code after $((SECONDS - start)) s; the end of $folder/$name.log:"
  tail -n 15 "$folder/$name.log"
  [ "$code" = 0 ] || failed+=("$name")
}

for name in "${parts[@]}"; do
  case $name in
    kernel) part $name python -m pytest -p no:cacheprovider -k "not interpreter" \
      tests/test_kernel.py tests/test_linear_kernel.py ;;
    kernel-bench) part $name python experiments/bench_kernel.py --out "$folder/kernel.json" ;;
    stages) part $name python -m pytest -p no:cacheprovider tests/test_cuda.py ;;
    bench) part $name python experiments/bench.py --only generate update --sizes 0.5b \
      --out "$folder/bench.json" ;;
    *) echo "gpu.sh: error: no part named $name" >&2; exit 2 ;;
  esac
done
[ ${#failed[@]} = 0 ] || { echo "gpu.sh: error: failed: ${failed[*]}" >&2; exit 1; }
