# Sourced by gpu.sh and gpu_steps.sh, with the default budget in BUDGET: reads --budget-seconds, looks for
# a CUDA device, and sets PYTHON, PYTHONPATH, COMMIT (of the rows; set it where git's history is not at
# hand) and OUT (default: benchmarks/results/<device>), which it makes. Nothing is installed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
if [ "${1:-}" = --budget-seconds ] && [ -n "${2:-}" ]; then BUDGET=$2; fi
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"' || exit 2
COMMIT=${COMMIT:-$(git rev-parse --short HEAD 2>/dev/null || echo unknown)}
if [ -z "${OUT:-}" ]; then
  OUT=$("$PYTHON" -c 'from fastpo.bench.script import results_path as p; print(p("x").parent)')
fi
mkdir -p "$OUT"
failed=0
