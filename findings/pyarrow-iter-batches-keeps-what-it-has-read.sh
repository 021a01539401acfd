#!/usr/bin/env bash
# ParquetFile.iter_batches keeps the file's bytes in memory as it goes, unless pre_buffer=False.
#
# Versions: pyarrow 26.0.1, numpy 2.4.6, Python 3.11.
#
# What surprises: iterating by batches looks like streaming, and every batch is dropped. Yet pyarrow
# reads ahead by default (pre_buffer=True) and keeps the buffers of all row groups until the
# iterator ends: memory grows to the size of the file. With pre_buffer=False it stays at one or two
# row groups. Only the images' column shows it; captions are small.
#
# Seen (a file of 20 row groups of 20 images of 200 kB, memory by pyarrow's own counter):
#   pyarrow 26.0.1
#   file 80 MB, row group 4 MB
#   default: most 90 MB; over the file 42, 42, 74, 74, 90
#   {'pre_buffer': False}: most 14 MB; over the file 14, 14, 14, 14, 14
#
# Why it matters: preference data sets hold both images in the row (Pick-a-Pic: files of about
# 500 MB); a preparation with several readers a node holds gigabytes that nobody asked for.
#
# What FastPO does: it reads single row groups (read_row_group) and keeps the last few.

set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore
python3 -m venv "$work/venv"
python=$work/venv/bin/python
install() { "$python" -m pip install -q --no-compile --disable-pip-version-check "$@"; }
install pyarrow==26.0.1 numpy==2.4.6

FILE=$work/images.parquet "$python" - <<'PYTHON'
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

path = os.environ["FILE"]
print("pyarrow", pa.__version__)
rng = np.random.default_rng(0)
schema = pa.schema({"jpg": pa.binary(), "caption": pa.string()})
with pq.ParquetWriter(path, schema) as writer:
    for _ in range(20):
        images = [rng.bytes(200_000) for _ in range(20)]
        writer.write_table(pa.table({"jpg": images, "caption": ["a cat"] * 20}, schema=schema))
size, group = os.path.getsize(path) / 1e6, 20 * 0.2
print(f"file {size:.0f} MB, row group {group:.0f} MB")


def most(**options):
    """The most that is allocated after a batch has been dropped, in MB."""
    base, seen = pa.total_allocated_bytes(), []
    for batch in pq.ParquetFile(path, **options).iter_batches(batch_size=10):
        del batch
        seen.append((pa.total_allocated_bytes() - base) / 1e6)
    quarter = len(seen) // 4
    text = ", ".join(f"{x:.0f}" for x in (*seen[::quarter], seen[-1]))
    print(f"{options or 'default'}: most {max(seen):.0f} MB; over the file {text}")
    return max(seen)


if most() < 0.8 * size:
    raise SystemExit("CHANGED: iter_batches no longer keeps the file")
if most(pre_buffer=False) > 6 * group:
    raise SystemExit("CHANGED: pre_buffer=False no longer bounds the memory")
PYTHON
