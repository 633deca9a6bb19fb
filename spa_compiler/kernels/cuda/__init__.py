"""CUDA kernels, one format per file: picture, pack/unpack, numpy reference, TVMScript, variants, cost.

`form.py` is the contract, `device.h` what a script may call, `source.py` the way from a script to CUDA source. Nothing
here needs a GPU or CUDA; `spa_compiler.targets.nvrtc` compiles the source.
"""
