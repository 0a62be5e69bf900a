"""The runners of a base model, a library each, imported when it is asked for."""

ENGINES = ("auto", "eager", "compile", "onnx", "openvino", "trt")
