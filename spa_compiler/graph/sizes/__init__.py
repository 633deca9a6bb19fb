"""Sizes and small values, node by node, for one binding of the inputs' open dimensions at a time.

`bindings` proposes sizes, `propagate` passes over the nodes with them. A node's value comes from `evaluate` where its
inputs' values are known and small; its shape from `onnx_shapes`, `microsoft_shapes`, `attention_shapes` or
`control_flow`, else from onnx's own `inference`. `known` is what all of them speak in.
"""
