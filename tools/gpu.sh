#!/usr/bin/env bash
# Tests and measures on a machine with a GPU that has PyTorch and pytest but perhaps no network.
#
#   make wheel                                on any machine, then carry dist/ along
#   make gpu STAGES="test bench" FILTER=s4    on the machine with the GPU
#
# STAGES  of: install test bench (all); FILTER  for the benchmark and pytest -k; BUDGET  seconds for the benchmark
# TEST_JOBS  processes for the tests (8); TEST_SECONDS  their limit (300)
# OUT     where results go (default bench/results/local); dist/deps/*.whl are installed too where present
set -euo pipefail
cd "$(dirname "$0")/.."

stages=${STAGES:-install test bench}
out=${OUT:-bench/results/local}
site=${SITE:-build/gpu-site}
python=${PYTHON:-python3}
mkdir -p "$out"
failed=""

if [[ " $stages " == *" install "* || ! -d $site/tconv ]]; then
  shopt -s nullglob
  wheels=(dist/tconv-*.whl dist/deps/*.whl)
  shopt -u nullglob
  if [[ ${#wheels[@]} -eq 0 ]]; then
    echo "gpu: there is no dist/tconv-*.whl; run 'make wheel' first" >&2
    exit 1
  fi
  rm -rf "$site"
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "${wheels[@]}"
fi
export PYTHONPATH="$PWD/$site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$python" -c 'import torch, tconv, sys; ok = torch.cuda.is_available()
print(f"gpu: tconv from {tconv.__file__}, PyTorch {torch.__version__},", torch.cuda.get_device_name() if ok else "no GPU")
sys.exit(not ok)'

if [[ " $stages " == *" test "* ]]; then
  timeout "${TEST_SECONDS:-300}" "$python" -m pytest tests -m "not large" -n "${TEST_JOBS:-8}" -q -p no:cacheprovider \
    ${FILTER:+-k "$FILTER"} 2>&1 | tee "$out/tests.txt" || failed="$failed test"
fi
if [[ " $stages " == *" bench "* ]]; then
  "$python" -m tconv bench --device cuda --budget "${BUDGET:-200}" --json "$out/cuda.json" \
    ${FILTER:+--filter "$FILTER"} ${BENCH_ARGS:-} | tee "$out/bench.txt" || failed="$failed bench"
fi
if [[ -n $failed ]]; then
  echo "gpu: failed:$failed" >&2
  exit 1
fi
echo "gpu: results in $out"
