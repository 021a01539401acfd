#!/usr/bin/env bash
# Whole training steps of the published models with random weights, within a budget:
#
#     benchmarks/gpu_steps.sh [--budget-seconds 560] [CASE...]
#
# All cases, or those named, the most important first; what does not fit into the budget is left out, so
# that a second call with the names of the rest measures it. One CSV a case, written row by row, goes to
# $OUT (default: benchmarks/results/<device>); `python benchmarks/plot_step.py $OUT/step-*.csv` draws them.
# Runs from a checkout; besides torch and Triton it needs accelerate, diffusers, peft, transformers,
# pydantic, PyYAML, rich, safetensors, pyarrow and numpy.
BUDGET=560
. "$(dirname "$0")/gpu_common.sh"
if [ "${1:-}" = --budget-seconds ]; then shift 2; fi
CASES=" $* "

# steps NAME SECONDS OPTIONS...: one case, if it is wanted, under a limit and never past the budget.
steps() {
  local name=$1 limit=$2 left=$((BUDGET - SECONDS))
  shift 2
  if [ "$CASES" != "  " ] && [[ "$CASES" != *" $name "* ]]; then return; fi
  if [ "$limit" -gt "$left" ]; then limit=$left; fi
  if [ "$limit" -lt 60 ]; then
    echo "== $name: left out, $left s of $BUDGET left"
    return
  fi
  echo "== $name: at most $limit s, from second $SECONDS"
  timeout --kill-after=5 "$limit" "$PYTHON" benchmarks/bench_step.py --commit "$COMMIT" \
    --out "$OUT/step-$name.csv" "$@" 2>&1 | tee -a "$OUT/steps.log" | tail -5
  if [ "${PIPESTATUS[0]}" -ne 0 ]; then failed=1; fi
}

# What `fastpo plan` predicts for an H100 at 40 % of its peak; none of it was measured. GB, in brackets
# seconds a step, of: the bare policy | ours with averages | the recipes of Diffusion-DPO, MaPO, Adaptive-DPO.
# Not in its seconds are that last recipe's copies through host memory, four times all weights a step:
# with LoRA 21 GB, else 41. A group takes as much as its largest step, all below 80 GB.
#   sdxl-lora-1    8 (0.10) |  8 (0.20) | 14 (0.18), 14 (0.15), 24 (0.25)
#   sdxl-full-1   49 (0.13) | 74 (0.23) | 56 (0.21), 51 (0.18), 66 (0.28)
#   sdxl-lora-4   12 (0.39) | 12 (0.80) | 30 (0.72), 30 (0.59), 40 (1.00)
#   sd15-lora-8   21 (0.07) | 21 (0.16) | 22 (0.19), 22 (0.16), 25 (0.26)
#   sd15-full-8   37 (0.10) | 45 (0.20) | 39 (0.22), 37 (0.19), 42 (0.29)
# An option's model stands beside the one without it: 22 GB and 5 GB of weights with LoRA, in full 31 GB of
# weights and states and at most 34 GB.
cached=("bare policy" "FastPO MaPO" "FastPO DPO, cached reference" "FastPO Adaptive-DPO, ledger, cached reference")
recipes=("recipe Diffusion-DPO" "recipe MaPO" "recipe Adaptive-DPO")
averages=("FastPO Adaptive-DPO, averages one by one, live reference"
  "FastPO Adaptive-DPO, averages in one pass, live reference")

# Long enough on the device that the host, 0.8 s a step of one pair, hides behind it (H200, 2026-11).
steps sdxl-lora-16 200 --size sdxl --method lora --pairs 16 --checkpointing --rounds 5 --peaks \
  --providers "${cached[@]}"
steps sdxl-lora-1 320 --size sdxl --method lora --pairs 1 --checkpointing --rounds 5 \
  --peaks "${cached[@]}" "${recipes[@]}"
steps sdxl-full-1 200 --size sdxl --method full --pairs 1 --checkpointing --rounds 3 --peaks
steps sdxl-lora-4 120 --size sdxl --method lora --pairs 4 --checkpointing --rounds 5 --peaks \
  --providers "${cached[@]}" "${averages[@]}" "recipe Diffusion-DPO" "recipe MaPO"
steps sd15-lora-8 150 --size sd15 --method lora --pairs 8 --rounds 5 --peaks
steps sd15-full-8 150 --size sd15 --method full --pairs 8 --rounds 5 --peaks
steps sdxl-lora-options 150 --size sdxl --method lora --pairs 1 --rounds 5 --peaks --options \
  torch.compile channels-last "flash attention" "xformers attention" "gradient checkpointing"
steps sdxl-full-options 110 --size sdxl --method full --pairs 1 --checkpointing --rounds 5 --peaks \
  --options "bf16 weights" "8-bit AdamW" Adafactor
echo "== done after $SECONDS s, failed: $failed"
exit "$failed"
