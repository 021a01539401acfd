#!/usr/bin/env bash
# Whole training steps of the published models with random weights, within a budget:
#
#     benchmarks/gpu_steps.sh [--budget-seconds 560]
#
# LoRA at one pair with gradient checkpointing first (does it stay under 24 GB?), then more pairs, full
# fine-tuning, SD1.5, and the trainer's options for memory and speed. One CSV a case goes to
# $OUT (default: benchmarks/results/<device>). Runs from a checkout; besides torch and Triton it needs
# accelerate, diffusers, peft, transformers, pydantic, PyYAML, rich, safetensors, pyarrow and numpy.
BUDGET=560
. "$(dirname "$0")/gpu_common.sh"

# steps NAME OPTIONS...: one case, never past the budget.
steps() {
  local name=$1 left=$((BUDGET - SECONDS))
  shift
  if [ "$left" -lt 60 ]; then
    echo "== $name: left out, $left s of $BUDGET left"
    return
  fi
  echo "== $name: from second $SECONDS"
  timeout --kill-after=5 "$left" "$PYTHON" benchmarks/bench_step.py --out "$OUT/step-$name.csv" "$@" \
    2>&1 | tee -a "$OUT/steps.log" | tail -5
  if [ "${PIPESTATUS[0]}" -ne 0 ]; then failed=1; fi
}

steps sdxl-lora-1 --size sdxl --method lora --pairs 1 --checkpointing --rounds 7
steps sdxl-lora-4 --size sdxl --method lora --pairs 4 --rounds 7 --no-peaks
steps sdxl-full-4 --size sdxl --method full --pairs 4 --checkpointing --rounds 7 --no-peaks
steps sd15-lora-16 --size sd15 --method lora --pairs 16 --rounds 7 --no-peaks
steps sdxl-full-options --size sdxl --method full --pairs 1 --checkpointing --rounds 5 --no-peaks \
  --options "bf16 weights" "8-bit AdamW" Adafactor
steps sdxl-lora-options --size sdxl --method lora --pairs 1 --rounds 5 --no-peaks \
  --options torch.compile channels-last "flash attention" "xformers attention" "gradient checkpointing"
echo "== done after $SECONDS s, failed: $failed"
exit "$failed"
