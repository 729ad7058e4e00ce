"""TensorRT 8.6, 10 and 11: engines planned, built, kept and run through its Python interface."""
