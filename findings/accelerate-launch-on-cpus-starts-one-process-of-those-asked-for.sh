#!/usr/bin/env bash
# `accelerate launch --cpu --num_processes 2` starts one process, and says nothing.
#
# Versions: accelerate 1.15.0, torch 2.13.0, Python 3.11.
#
# What surprises: on a CPU `--num_processes` counts only where MPI starts the processes.
# `--cpu --num_processes 2` is accepted, exits 0, and the script sees a world of one process.
# `torchrun --nproc_per_node 2` on the same script gives two.
#
# Seen:
#   accelerate 1.15.0 torch 2.13.0+cpu
#   accelerate launch --cpu --num_processes 2: exit 0, 0 of 1
#   torchrun --nproc_per_node 2: exit 0, 0 of 2, 1 of 2
#
# Why it matters: trainers of diffusion models are tried with several processes on a CPU before a
# machine with GPUs is paid for, and data sharding, gradient averaging and saving on one rank alone
# then pass a trial that never ran them. An effective batch size computed from the flag is wrong by
# the same factor.
#
# What FastPO does: a run's banner names the number of processes, and says so where this launcher
# was asked for several on a CPU and started one. The documentation names torchrun for that.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export CUDA_VISIBLE_DEVICES= TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore OMP_NUM_THREADS=1
export HF_HOME="$work/home"
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install torch==2.13.0
install accelerate==1.15.0

cat > "$work/who.py" <<'PYTHON'
import os
from accelerate import Accelerator

at = Accelerator(cpu=True)
with open(os.path.join(os.environ["SAID"], str(at.process_index)), "w") as file:
    file.write(f"{at.process_index} of {at.num_processes}")
PYTHON

"$python" -c 'import accelerate, torch; print("accelerate", accelerate.__version__, "torch", torch.__version__)'
said() {  # runs a launcher and prints what its processes say of themselves
    local name=$1; shift
    export SAID="$work/$name"
    mkdir "$SAID"
    "$@" > "$work/log" 2>&1 || { cat "$work/log"; exit 1; }
    for file in "$SAID"/*; do cat "$file"; echo; done | paste -sd, | sed 's/,/, /g'
}
one=$(said accelerate "$work/venv/bin/accelerate" launch --cpu --num_processes 2 --num_machines 1 \
    --mixed_precision no --dynamo_backend no "$work/who.py")
two=$(said torchrun "$work/venv/bin/torchrun" --nproc_per_node 2 "$work/who.py")
echo "accelerate launch --cpu --num_processes 2: exit 0, $one"
echo "torchrun --nproc_per_node 2: exit 0, $two"
[ "$two" = "0 of 2, 1 of 2" ] || { echo "CHANGED: torchrun starts other processes"; exit 1; }
[ "$one" = "0 of 1" ] || { echo "CHANGED: accelerate starts what it is asked for"; exit 1; }
echo "still so"
