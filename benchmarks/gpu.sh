#!/usr/bin/env bash
# The CUDA tests, then every benchmark, in under nine minutes. CSV, tables and logs go to $OUT
# (default: benchmarks/results/<device>). Run from the repository's root.
set -uo pipefail
PYTHON=${PYTHON:-python}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}"
LOGS=${OUT:-$(mktemp -d)}
mkdir -p "$LOGS"
"$PYTHON" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"' || exit 2

timeout 150 "$PYTHON" -m pytest tests/kernels tests/fastpo/test_loss.py -q -m "not slow" \
  --deselect tests/kernels/test_aot.py 2>&1 | tee "$LOGS/tests.log" | tail -20
failed=${PIPESTATUS[0]}
if [ "$failed" -ne 0 ]; then
  echo "tests failed ($failed): what follows is timed for diagnosis, not for publication"
fi

timeout 200 "$PYTHON" benchmarks/bench_pair_loss.py --skip-tests --budget 170 --seconds 0.15 \
  --objectives dpo --latents sdxl sd15 video --dtypes bf16 fp32 --pairs 1 16 256 \
  --providers eager compile ours ours-graph 2>&1 | tee "$LOGS/pair_loss.log"
timeout 70 "$PYTHON" benchmarks/bench_pair_noise.py --skip-tests --budget 50 --seconds 0.15 \
  --predictions epsilon flow --latents sdxl video --dtypes bf16 --pairs 1 16 64 \
  --providers randn eager compile ours ours-graph 2>&1 | tee "$LOGS/pair_noise.log"
timeout 60 "$PYTHON" benchmarks/launch_table.py 2>&1 | tee "$LOGS/launches.log"
exit "$failed"
