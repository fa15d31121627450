"""Networks as graphs: one internal form, filled from ``torch.export`` (`capture`) or straight from ONNX (`onnx`)."""
