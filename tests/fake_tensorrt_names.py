"""Which names of TensorRT's Python interface the stand-in has, and in which versions.

Copied from introspection of the bindings; `test_trt_stand_in` compares it with the record of that, where there is one.
"""

from __future__ import annotations

import re

VERSIONS = ("8.6.0", "10.0.1", "10.3.0", "10.7.0", "10.12.0.36", "10.16.1.11", "11.0.0.114", "11.4.0.106")

# class: its members; "<11" is gone in 11, ">=10" came with 10
TABLE = {
    "Builder": "create_network create_builder_config create_optimization_profile build_serialized_network",
    "NetworkDefinitionCreationFlag": "EXPLICIT_BATCH<11 STRONGLY_TYPED>=10",
    "BuilderFlag": "FP16<11 INT8<11 OBEY_PRECISION_CONSTRAINTS<11 TF32",
    "MemoryPoolType": "WORKSPACE",
    "IBuilderConfig": "set_flag clear_flag get_flag set_memory_pool_limit get_memory_pool_limit "
    "builder_optimization_level add_optimization_profile create_timing_cache set_timing_cache get_timing_cache",
    "IOptimizationProfile": "set_shape get_shape",
    "ITimingCache": "serialize",
    "INetworkDefinition": "num_layers get_layer num_outputs get_output num_inputs get_input",
    "ILayer": "name type num_inputs get_input num_outputs get_output precision<11 set_output_type<11",
    "ITensor": "name dtype is_shape_tensor",
    "OnnxParser": "parse_from_file num_errors get_error",
    "ParserError": "desc node",
    "Runtime": "deserialize_cuda_engine",
    "ICudaEngine": "num_io_tensors get_tensor_name get_tensor_shape get_tensor_dtype get_tensor_mode "
    "get_tensor_profile_shape create_execution_context",
    "IExecutionContext": "set_input_shape infer_shapes get_tensor_shape set_tensor_address execute_async_v3",
    "IHostMemory": "nbytes",
    "ILogger": "log",
    "DataType": "FLOAT HALF INT8 INT32 BOOL INT64>=10",
    "Severity": "INTERNAL_ERROR ERROR WARNING INFO VERBOSE",
    "LayerType": "ACTIVATION CAST CONCATENATION CONSTANT CONVOLUTION DEQUANTIZE ELEMENTWISE FILL GATHER GRID_SAMPLE "
    "IDENTITY MATRIX_MULTIPLY NORMALIZATION POOLING QUANTIZE REDUCE RESIZE SELECT SHAPE SHUFFLE SLICE SOFTMAX TOPK "
    "UNARY",
}

Version = tuple[int, ...]


def numbers(version: str) -> Version:
    """ "10.12.0.36" as numbers, which compare."""
    return tuple(int(part) for part in version.split("."))


def _entries() -> dict[str, tuple[str, Version]]:
    """ "class.member" -> ("<" or ">=" or "", the version)."""
    found = {}
    for name, members in TABLE.items():
        for member, sign, version in re.findall(r"(\w+)(<|>=)?([\d.]+)?", members):
            found[f"{name}.{member}"] = (sign, numbers(version) if version else ())
    return found


NAMES = _entries()


def exists(name: str, version: str) -> bool:
    """Whether "class.member" is there in a version."""
    sign, edge = NAMES[name]
    return not sign or (numbers(version) < edge if sign == "<" else numbers(version) >= edge)
