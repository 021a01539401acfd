"""Benchmarks of the kernels, for `fastpo bench` and the scripts under `benchmarks/`.

`measure` times, `cases` says what, `losses` and `noise` hold the providers, `run` goes through the
cases within a budget, `table` writes CSV and Markdown, `show` prints. Nothing here imports more
than torch before it is needed, so that a bare GPU machine can run it from a checkout.
"""
