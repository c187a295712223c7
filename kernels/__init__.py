"""Integer kernels: one file each, a numpy reference beside its ONNX lowering."""
