"""What the C loader of a bundle must know of the model, as a header: C has no JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_TYPES = {
    "bool": "BOOL", "float32": "FLOAT", "float64": "DOUBLE", "int8": "INT8", "int32": "INT32", "int64": "INT64",
    "uint8": "UINT8", "uint32": "UINT32",
}  # fmt: skip
_BYTES = {"bool": 1, "float32": 4, "float64": 8, "int8": 1, "int32": 4, "int64": 8, "uint8": 1, "uint32": 4}
_MOST_DIMS = 8


def c_header(manifest: Mapping[str, Any]) -> str:
    """`sample.h`: names, types, shapes and files of inputs and outputs, and whether bits are promised."""
    lines = ["/* Written by qcompile bundle: the ends of the model and the sample that the loader checks itself by. */"]
    lines += ["#ifndef QCOMPILE_SAMPLE_H", "#define QCOMPILE_SAMPLE_H", "#include <stddef.h>", "#include <stdint.h>"]
    lines += ["#include <onnxruntime_c_api.h>", "", "typedef struct {", "    const char *name, *file;"]
    lines += [
        "    ONNXTensorElementDataType type;",
        "    size_t bytes, rank;",
        f"    int64_t dims[{_MOST_DIMS}];",
        "} Sample;",
        "",
    ]
    for kind in ("inputs", "outputs"):
        lines += [f"static const Sample {kind}[] = {{"]
        for record in manifest[kind]:
            count = _BYTES[record["type"]]
            for size in record["dims"]:
                count *= size
            dims = ", ".join(str(d) for d in record["dims"]) or "0"
            element = f"ONNX_TENSOR_ELEMENT_DATA_TYPE_{_TYPES[record['type']]}"
            name = json.dumps(record["name"])
            lines += [f'    {{{name}, "{record["file"]}", {element}, {count}, {len(record["dims"])}, {{{dims}}}}},']
        lines += ["};"]
    exact = int(manifest["promise"] == "bits")
    lines += [f"enum {{ INPUTS = {len(manifest['inputs'])}, OUTPUTS = {len(manifest['outputs'])}, EXACT = {exact} }};"]
    lines += [f"static const double CLOSE = {manifest['close']!r};", "#endif", ""]
    return "\n".join(lines)
