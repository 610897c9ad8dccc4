"""The owner's side: an ONNX model in, a sealed package out. Runs where plaintext is allowed."""
