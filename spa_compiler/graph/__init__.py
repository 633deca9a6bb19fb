"""An ONNX file as an onnx-graphsurgeon graph: load, canonicalize, shapes, weights, save; session.py runs it."""
