"""The losses on a CPU in C++: passes over the predictions, and the mathematics between them.

`module` is the compiled code, which an installation without a C++ compiler does not have; `launch`
hands tensors to it, `loss` differentiates. `pair_loss/cpu.py` decides what comes here.
"""
