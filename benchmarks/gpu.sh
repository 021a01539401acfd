#!/usr/bin/env bash
# The CUDA tests, then every benchmark and the sweep of launch configurations, within a budget, the
# most important rows first; or what earlier calls have left of the losses' grid:
#
#     benchmarks/gpu.sh [--budget-seconds 530]
#     benchmarks/gpu.sh --rest [--budget-seconds 530]
#
# CSV files, the table of launches and one log go to $OUT (default: benchmarks/results/<device>). The
# losses' rows of the same commit that lie in benchmarks/results/<device> are taken over, not measured
# again.
# Runs from a checkout and installs nothing: torch, Triton, numpy and pytest (with PyYAML and
# Pillow, which the tests' fixtures use) must be there, pytest-xdist is used where it is.
REST=
if [ "${1:-}" = --rest ]; then REST=1; shift; fi
BUDGET=530
. "$(dirname "$0")/gpu_common.sh"
LOG="$OUT/run.log"

# stage NAME SECONDS COMMAND...: the command under a limit, never past the budget, into the log.
stage() {
  local name=$1 limit=$2 left=$((BUDGET - SECONDS)) code
  shift 2
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  if [ "$limit" -lt 20 ]; then
    echo "== $name: left out, $left s of $BUDGET left" | tee -a "$LOG"
    return
  fi
  echo "== $name: at most $limit s, from second $SECONDS" | tee -a "$LOG"
  # What a stage measures must end by itself, so that its last rows are written.
  timeout --kill-after=5 "$limit" "${@//@BUDGET@/$((limit - 15))}" 2>&1 | tee -a "$LOG" | tail -40
  code=${PIPESTATUS[0]}
  if [ "$code" -ne 0 ]; then
    echo "== $name: exit code $code" | tee -a "$LOG"
    failed=1
  fi
}

: >"$LOG"
"$PYTHON" -c 'import sys, torch, triton; print(sys.version, torch.__version__, triton.__version__)' \
  | tee -a "$LOG"
kept=$("$PYTHON" -c 'from fastpo.bench.script import results_path as p; print(p("pair_loss"))')
if [ ! -e "$OUT/pair_loss.csv" ] && grep -qs ",$COMMIT," "$kept"; then cp "$kept" "$OUT/pair_loss.csv"; fi

# losses SECONDS: rows of the losses that there are none of yet.
losses() {
  stage pair_loss "$1" "$PYTHON" benchmarks/bench_pair_loss.py --append --skip-tests --seconds 0.15 \
    --budget-seconds @BUDGET@ --commit "$COMMIT" --out "$OUT/pair_loss.csv"
}

if [ -n "$REST" ]; then
  losses "$BUDGET"
  echo "== done after $SECONDS s, failed: $failed" | tee -a "$LOG"
  exit "$failed"
fi
spread=()
workers=$(($(nproc) > 12 ? 12 : $(nproc)))
if "$PYTHON" -c 'import xdist' 2>/dev/null; then spread=(-n "$workers"); fi
# The slow GPU tests too; not what runs on the CPU alone.
stage tests 150 "$PYTHON" -m pytest tests/kernels tests/loss/test_loss.py -q -p no:cacheprovider \
  ${spread[@]+"${spread[@]}"} -m "gpu or not slow" -k "not cpu_default and not rough_hardware" \
  --ignore tests/kernels/test_aot.py --ignore tests/kernels/test_launches.py
if [ "$failed" -ne 0 ]; then
  echo "== tests failed: what follows is timed for diagnosis, not for publication" | tee -a "$LOG"
fi
losses 180
stage launches 60 "$PYTHON" benchmarks/launch_table.py --out "$OUT/launches.md"
stage pair_noise 40 "$PYTHON" benchmarks/bench_pair_noise.py --skip-tests --seconds 0.1 \
  --budget-seconds @BUDGET@ --commit "$COMMIT" --out "$OUT/pair_noise.csv" --dtypes bf16
stage tune 55 "$PYTHON" -m fastpo.bench.tune --budget-seconds @BUDGET@ --commit "$COMMIT" \
  --out "$OUT/launch_configs.csv"
losses "$BUDGET" # with what is left
echo "== done after $SECONDS s, failed: $failed" | tee -a "$LOG"
exit "$failed"
