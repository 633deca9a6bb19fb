"""Generated kernels, one format or step per file: the format in words, pack/unpack, a numpy reference, the TVMScript.

A kernel is a C function on raw pointers. Nothing here knows ONNX, ONNX Runtime or threads.

Activations live in panels: a tile of tokens is `[features, lanes]` (feature-major), `lanes` one of
`panel.LANE_COUNTS`. Every step has one function per lane count, so that one token costs one lane, not sixteen.
"""
