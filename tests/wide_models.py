"""Tiny transformers as text with random weights (d = 16, 2 heads), and a way to compile them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto
from passes_helpers import parse

from qcompile.graph import Array
from qcompile.pipeline import Compiled, compile_model
from qcompile.runtime import Feeds

D, HEADS, WIDE, WORDS, LONGEST, CLASSES = 16, 2, 32, 24, 12, 3
MASKS = {
    "none": "",
    "additive": """
        mask4 = Unsqueeze(mask, mask_axes) kept = Cast<to = 1>(mask4) away = Sub(one, kept) lowered = Mul(away, least)""",
    "where": """
        mask4 = Unsqueeze(mask, mask_axes) keep = Cast<to = 9>(mask4)""",
}
NORMS = {
    "layer": "{y} = LayerNormalization<axis = -1, epsilon = 1e-5>({x}, {p}g, {p}b)",
    "rms": """{p}sq = Pow({x}, two) {p}ms = ReduceMean<keepdims = 1>({p}sq, last) {p}me = Add({p}ms, eps) {p}rt = Sqrt({p}me)
              {p}n = Div({x}, {p}rt) {y} = Mul({p}n, {p}g)""",
}
FUNCTIONS = {
    "gelu": "{y} = Gelu({x})",
    "tanh_gelu": '{y} = Gelu<approximate = "tanh">({x})',
    "erf": """{x}d = Div({x}, root2) {x}e = Erf({x}d) {x}o = Add({x}e, one) {x}m = Mul({x}, {x}o) {y} = Mul({x}m, half)""",
    "silu": "{x}_s = Sigmoid({x}) {y} = Mul({x}, {x}_s)",
}


@dataclass(frozen=True)
class Spec:
    """What a tiny transformer is made of.

    order: pre | post norm; ends: tokens | patches; pool: first | mean | masked; length: None where it is dynamic.
    """

    order: str = "pre"
    ends: str = "patches"
    mask: str = "none"
    norm: str = "layer"
    function: str = "gelu"
    pool: str = "first"
    length: int | None = 8
    scaled: str = "after"  # 1/sqrt(d): after the product, or on the queries
    blocks: int = 2

    @property
    def masked(self) -> bool:
        """Whether it has an input `mask`."""
        return self.mask != "none" or self.pool == "masked"


def transformer(spec: Spec, seed: int = 0) -> ModelProto:
    """float32 model: (x [N, L, 12] or ids [N, L] int64, mask [N, L] int64) => y [N, 3]."""
    length = "L" if spec.length is None else str(spec.length)
    inputs = [f"int64[N, {length}] ids" if spec.ends == "tokens" else f"float[N, {length}, 12] x"]
    inputs += [f"int64[N, {length}] mask"] if spec.masked else []
    start = (
        """shape = Shape(ids) size = Gather<axis = 0>(shape, one_index) places = Range(zero_index, size, step_index)
           words = Gather(table, ids) at = Gather(positions, places) joined = Add(words, at)"""
        if spec.ends == "tokens"
        else "embedded = MatMul(x, we) joined = Add(embedded, be)"
    )
    first = _norm(spec, "joined", "h0", "n0") if spec.order == "post" else "h0 = Identity(joined)"
    blocks = [_block(spec, f"h{i}", f"h{i + 1}", "AC"[i]) for i in range(spec.blocks)]
    end = f"h{spec.blocks}"
    body = [MASKS[spec.mask], start, first, *blocks]
    last = _norm(spec, end, "h", "nz") if spec.order == "pre" else f"h = Identity({end})"
    body += [last, _pool(spec), "y = Gemm<transB = 1>(pooled, wy, by)"]
    return parse(f"g ({', '.join(inputs)}) => (float[N, {CLASSES}] y) {{ {' '.join(body)} }}", 21, **_weights(seed))


def _norm(spec: Spec, x: str, y: str, prefix: str) -> str:
    return NORMS[spec.norm].format(x=x, y=y, p=prefix)


def _linear(x: str, y: str, name: str) -> str:
    return f"{y}_p = MatMul({x}, {name}_w) {y} = Add({y}_p, {name}_b)"


def _block(spec: Spec, x: str, y: str, p: str) -> str:
    pre = spec.order == "pre"
    read, inner = (f"{p}r", f"{p}i") if pre else (x, f"{p}s")
    lines = [_norm(spec, x, read, f"{p}n1")] if pre else []
    for role in "qkv":
        lines.append(_linear(read, f"{p}{role}0", f"{p}{role}"))
        lines.append(f"{p}{role}1 = Reshape({p}{role}0, heads)")
        permutation = "0, 2, 3, 1" if role == "k" else "0, 2, 1, 3"
        lines.append(f"{p}{role}2 = Transpose<perm = [{permutation}]>({p}{role}1)")
    if spec.scaled == "after":
        lines.append(f"{p}z0 = MatMul({p}q2, {p}k2) {p}z = Div({p}z0, root)")
    else:
        lines.append(f"{p}q3 = Div({p}q2, root) {p}z = MatMul({p}q3, {p}k2)")
    masked = {"none": f"{p}z", "additive": f"{p}zm", "where": f"{p}zm"}[spec.mask]
    lines.append(
        {"none": "", "additive": f"{p}zm = Add({p}z, lowered)", "where": f"{p}zm = Where(keep, {p}z, infinite)"}[spec.mask]
    )
    lines.append(f"{p}e = Softmax<axis = -1>({masked}) {p}c0 = MatMul({p}e, {p}v2) {p}c1 = Transpose<perm = [0, 2, 1, 3]>({p}c0)")
    lines.append(f"{p}c = Reshape({p}c1, flat)")
    lines.append(_linear(f"{p}c", f"{p}o", f"{p}o"))
    lines.append(f"{inner} = Add({x}, {p}o)")
    lines.append(_norm(spec, inner, f"{p}t", f"{p}n2"))
    lines.append(_linear(f"{p}t", f"{p}f0", f"{p}f"))
    lines.append(FUNCTIONS[spec.function].format(x=f"{p}f0", y=f"{p}f1"))
    lines.append(_linear(f"{p}f1", f"{p}g0", f"{p}g"))
    if pre:
        lines.append(f"{y} = Add({inner}, {p}g0)")
    else:
        lines.append(f"{p}u = Add({p}t, {p}g0)")
        lines.append(_norm(spec, f"{p}u", y, f"{p}n1"))
    return " ".join(lines)


def _pool(spec: Spec) -> str:
    if spec.pool == "mean":
        return "pooled = ReduceMean<keepdims = 0>(h, middle)"
    if spec.pool == "masked":
        return """whole = Cast<to = 1>(mask) weight = Unsqueeze(whole, last) weighted = Mul(h, weight)
            total = ReduceSum<keepdims = 0>(weighted, middle) counted = ReduceSum<keepdims = 0>(weight, middle)
            count = Clip(counted, little) pooled = Div(total, count)"""
    return "pooled = Gather<axis = 1>(h, zero_index)"


def _weights(seed: int) -> dict[str, Array]:
    rng = np.random.default_rng(seed)

    def normal(*shape: int, size: float) -> Array:
        return (rng.normal(size=shape) * size).astype(np.float32)

    found: dict[str, Array] = {
        "we": normal(12, D, size=0.4),
        "be": normal(D, size=0.1),
        "table": normal(WORDS, D, size=1.0),
        "positions": normal(LONGEST, D, size=0.3),
        "wy": normal(CLASSES, D, size=0.5),
        "by": normal(CLASSES, size=0.1),
    }
    for p in "AC":
        for role, rows, columns in (("q", D, D), ("k", D, D), ("v", D, D), ("o", D, D), ("f", D, WIDE), ("g", WIDE, D)):
            found[f"{p}{role}_w"] = normal(rows, columns, size=1.2 / np.sqrt(rows))
            found[f"{p}{role}_b"] = normal(columns, size=0.1)
    for prefix in ("n0", "nz", "An1", "An2", "Cn1", "Cn2"):
        found[prefix + "g"] = (1 + normal(D, size=0.2)).astype(np.float32)
        found[prefix + "b"] = normal(D, size=0.1)
    whole = {"heads": [0, 0, HEADS, D // HEADS], "flat": [0, 0, D], "mask_axes": [1, 2], "last": [-1], "middle": [1]}
    found |= {key: np.asarray(value, np.int64) for key, value in whole.items()}
    found |= {key: np.asarray(v, np.int64) for key, v in {"one_index": 1, "zero_index": 0, "step_index": 1}.items()}
    numbers = {"one": 1, "two": 2, "half": 0.5, "root2": np.sqrt(2), "root": np.sqrt(D // HEADS), "least": -1e4}
    numbers |= {"eps": 1e-5, "little": 1e-9, "infinite": -np.inf}
    return found | {key: np.asarray(value, np.float32) for key, value in numbers.items()}


def feed(spec: Spec, lengths: list[int], seed: int = 0, longest: int | None = None) -> dict[str, Array]:
    """A batch of rows that have `lengths` tokens before padding; all of them full where there is no mask."""
    rng = np.random.default_rng(seed)
    size = spec.length or longest or max(lengths)
    rows = [np.random.default_rng([seed, i]) for i in range(len(lengths))]
    if spec.ends == "tokens":
        values = np.stack([r.integers(0, WORDS, LONGEST) for r in rows])[:, :size].astype(np.int64)
        made: dict[str, Array] = {"ids": values}
    else:
        made = {"x": rng.normal(size=(len(lengths), size, 12)).astype(np.float32)}
    if spec.masked:
        made["mask"] = (np.arange(size)[None] < np.asarray(lengths)[:, None]).astype(np.int64)
    return made


def samples(spec: Spec, count: int, seed: int = 1) -> list[dict[str, Array]]:
    """Padded rows of 3 tokens or more, one a feed."""
    rng = np.random.default_rng(seed)
    most = spec.length or LONGEST
    lengths = rng.integers(3, most, count, endpoint=True)
    return [feed(spec, [int(n)], seed * 1000 + i, most) for i, n in enumerate(lengths)]


def written(spec: Spec, folder: Path, name: str = "", **options: Any) -> Compiled:
    """Compile the tiny transformer; `options` of `compile_model`."""
    source = folder / "float.onnx"
    onnx.save(transformer(spec), source)
    given: dict[str, Any] = {"effort": "fast", "latency": False, **options}
    rows = samples(spec, 32)
    np.savez(folder / "data.npz", **{key: np.concatenate([row[key] for row in rows]) for key in rows[0]})  # type: ignore[arg-type]
    path = folder / f"{name or given.get('format', 'qdq')}.onnx"
    return compile_model(source, path, data=folder / "data.npz", **given)


def outputs(session: Any, feeds: list[Feeds]) -> list[Array]:
    """The first output for each feed."""
    return [next(iter(session.run(f).values())) for f in feeds]
