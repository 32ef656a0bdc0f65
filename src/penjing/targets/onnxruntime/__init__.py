"""ONNX files and ONNX Runtime: a net becomes a file, and the file runs."""
