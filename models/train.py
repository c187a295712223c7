"""Train and export the small models that ship with qcompile: `digits_cnn.onnx` and `digits_vit.onnx`.

Data: the 1797 handwritten digits bundled with scikit-learn, 8x8 pixels of 0..16, scaled to [0, 1] float32. A stratified
split with a fixed seed holds out 500; they are used for nothing but the final accuracy. 200 of the training
samples, stratified too, are kept as calibration data.

Models: both take `input` [N, 1, 8, 8] float32 and give `logits` [N, 10] float32. They are exported as users export theirs:
BatchNormalization is left in, GELU is written out with Erf, and the exporter's shape arithmetic stays.

Written to the folder given by `--out` (the one this file lies in by default):

* `digits_cnn.onnx`, `digits_vit.onnx`: weights inside the file.
* `digits.npz`: `input`, `labels` (held out) and `calib_input` (calibration).
* `digits_calib.npz`: `input`, the same calibration samples, for tools that take one file for calibration.

Usage: `python models/train.py [--out FOLDER]`, about two minutes on one CPU core. Everything is seeded and single-threaded: the
same versions on the same type of CPU write the same bytes.
"""

from __future__ import annotations

import math
import tempfile
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

SEED = 20
HELD_OUT = 500
CALIBRATION = 200
CLASSES = 10
OPSET = 17
BATCH_SIZE = 64
MAX_FILE_BYTES = 1_000_000


@dataclass(frozen=True)
class Digits:
    """Images [n, 1, 8, 8] float32 in [0, 1] with labels [n] int64: one part to train on, one held out, one to calibrate with.

    The calibration images are a subset of the training images.
    """

    train_images: npt.NDArray[np.float32]
    train_labels: npt.NDArray[np.int64]
    held_out_images: npt.NDArray[np.float32]
    held_out_labels: npt.NDArray[np.int64]
    calibration_images: npt.NDArray[np.float32]


def load_data() -> Digits:
    """Split scikit-learn's digits: `HELD_OUT` samples apart, `CALIBRATION` of the rest for calibration."""
    pixels, targets = load_digits(return_X_y=True)
    images = (pixels.reshape(-1, 1, 8, 8) / 16).astype(np.float32)
    labels = targets.astype(np.int64)
    train_images, held_out_images, train_labels, held_out_labels = train_test_split(
        images, labels, test_size=HELD_OUT, stratify=labels, random_state=SEED
    )
    _, calibration_images = train_test_split(train_images, test_size=CALIBRATION, stratify=train_labels, random_state=SEED)
    return Digits(train_images, train_labels, held_out_images, held_out_labels, calibration_images)


def save_data(data: Digits, folder: Path) -> None:
    """Write `digits.npz` and `digits_calib.npz` as the module's docstring describes them."""
    np.savez_compressed(
        folder / "digits.npz",
        input=data.held_out_images,
        labels=data.held_out_labels,
        calib_input=data.calibration_images,
    )
    np.savez_compressed(folder / "digits_calib.npz", input=data.calibration_images)


def conv_bn(channels_in: int, channels_out: int, kernel: int, *, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Conv without bias and the BatchNorm after it; "same" padding."""
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(channels_out)]


class Residual(nn.Module):  # type: ignore[misc, unused-ignore]  # torch is untyped where it is not installed
    """ReLU(x + Conv-BN(ReLU(Conv-BN(x)))), after He et al. 2015 (arXiv:1512.03385), figure 2."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(*conv_bn(channels, channels, 3), nn.ReLU(), *conv_bn(channels, channels, 3))
        self.relu = nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, C, H, W] -> the same shape."""
        y: torch.Tensor = self.relu(x + self.branch(x))
        return y


def build_cnn() -> nn.Module:
    """Stem, residual block, depthwise-separable block (Howard et al. 2017, arXiv:1704.04861), pooling, classifier."""
    width = 32
    layers = {
        "stem": nn.Sequential(*conv_bn(1, width, 3), nn.ReLU()),
        "residual": Residual(width),
        "depthwise": nn.Sequential(*conv_bn(width, width, 3, stride=2, groups=width), nn.ReLU6()),
        "pointwise": nn.Sequential(*conv_bn(width, 2 * width, 1), nn.ReLU()),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flatten": nn.Flatten(),
        "classifier": nn.Linear(2 * width, CLASSES),
    }
    return nn.Sequential(OrderedDict(layers))


class Attention(nn.Module):  # type: ignore[misc, unused-ignore]
    """Multi-head self-attention (Vaswani et al. 2017, arXiv:1706.03762, section 3.2), written out with MatMul and Softmax."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_width = width // heads
        self.scale = self.head_width**-0.5
        self.query_key_value = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, tokens, width] -> the same shape."""
        batch, tokens, width = x.shape
        split = self.query_key_value(x).reshape(batch, tokens, 3, self.heads, self.head_width)
        query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (query * self.scale) @ key.transpose(-2, -1)
        context = scores.softmax(dim=-1) @ value
        y: torch.Tensor = self.projection(context.transpose(1, 2).reshape(batch, tokens, width))
        return y


class Block(nn.Module):  # type: ignore[misc, unused-ignore]
    """Pre-norm transformer block: x + Attention(LayerNorm(x)), then x + MLP(LayerNorm(x)) with an Erf GELU."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, tokens, width] -> the same shape."""
        x = x + self.attention(self.norm_1(x))
        y: torch.Tensor = x + self.mlp(self.norm_2(x))
        return y


class VisionTransformer(nn.Module):  # type: ignore[misc, unused-ignore]
    """2x2 patches, a class token, learned positions, `depth` blocks (Dosovitskiy et al. 2020, arXiv:2010.11929)."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 3) -> None:
        super().__init__()
        tokens = 1 + (8 // 2) ** 2
        self.patch_embedding = nn.Conv2d(1, width, 2, stride=2)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position_embedding = nn.Parameter(0.02 * torch.randn(1, tokens, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 1, 8, 8] -> [N, 10]."""
        patches = self.patch_embedding(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), patches], dim=1)
        tokens = self.blocks(tokens + self.position_embedding)
        logits: torch.Tensor = self.head(self.norm(tokens)[:, 0])
        return logits


@dataclass(frozen=True)
class Recipe:
    """How one model is built and trained, and the held-out accuracy below which it must not be shipped."""

    name: str
    build: Callable[[], nn.Module]
    epochs: int
    learning_rate: float
    weight_decay: float
    least_accuracy: float


RECIPES = (
    Recipe("digits_cnn", build_cnn, 80, 5e-3, 1e-3, 0.98),
    Recipe("digits_vit", VisionTransformer, 200, 2e-3, 5e-2, 0.97),
)


def augment(images: torch.Tensor) -> torch.Tensor:
    """Turn, scale and shift each image [n, 1, 8, 8] a little: up to 10 degrees, 10 % and one pixel."""
    count = len(images)
    angle = math.radians(10) * (2 * torch.rand(count) - 1)
    scale = 1 + 0.1 * (2 * torch.rand(count) - 1)
    # affine_grid's unit is half the image: one pixel of eight is 0.25.
    shift = 0.25 * (2 * torch.rand(count, 2) - 1)
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    rows = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1)
    grid = functional.affine_grid(rows.reshape(count, 2, 3), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


def train(recipe: Recipe, data: Digits) -> nn.Module:
    """Train from scratch with AdamW under one learning-rate cycle; the model comes back in evaluation mode."""
    torch.manual_seed(SEED)
    model = recipe.build()
    images = torch.from_numpy(data.train_images)
    labels = torch.from_numpy(data.train_labels)
    steps = math.ceil(len(images) / BATCH_SIZE)
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=recipe.learning_rate, total_steps=recipe.epochs * steps)
    model.train()
    for _ in range(recipe.epochs):
        order = torch.randperm(len(images))
        for start in range(0, len(images), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            logits = model(augment(images[chosen]))
            loss = functional.cross_entropy(logits, labels[chosen], label_smoothing=0.1)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
    return model.eval()


def export(model: nn.Module, name: str) -> onnx.ModelProto:
    """Export with a dynamic batch `N`; BatchNormalization nodes stay, in inference form.

    The TorchScript exporter is used because torch's newer one folds BatchNormalization into Conv as it optimises. In plain
    evaluation mode this one folds too; `PRESERVE` keeps the nodes, and as the model is in evaluation mode their
    `training_mode` is 0.
    """
    keeps_bn = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    mode = torch.onnx.TrainingMode.PRESERVE if keeps_bn else torch.onnx.TrainingMode.EVAL
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # That exporter is deprecated, and says so several times.
        warnings.simplefilter("ignore", DeprecationWarning)
        path = Path(folder) / "exported.onnx"
        torch.onnx.export(
            model,
            (torch.zeros(2, 1, 8, 8),),
            path,
            dynamo=False,
            opset_version=OPSET,
            training=mode,
            do_constant_folding=not keeps_bn,
            input_names=["input"],
            output_names=["logits"],
            dynamic_axes={"input": {0: "N"}, "logits": {0: "N"}},
        )
        proto = onnx.load_model(path)
    strip_provenance(proto)
    proto.graph.name = name
    onnx.checker.check_model(proto, full_check=True)
    return proto


def strip_provenance(proto: onnx.ModelProto) -> None:
    """Remove doc strings and metadata in place: the exporter writes stack traces with local paths there."""
    proto.doc_string = ""
    proto.graph.doc_string = ""
    del proto.metadata_props[:]
    del proto.graph.metadata_props[:]
    for item in (*proto.graph.node, *proto.graph.initializer, *proto.graph.value_info):
        item.doc_string = ""
        del item.metadata_props[:]


def verify(recipe: Recipe, model: nn.Module, path: Path, data: Digits) -> float:
    """Run the written file in onnxruntime on the held-out samples; returns its accuracy, 0..1.

    Raises ClickException where it is too large, differs from torch by more than float rounding, or is not accurate enough.
    """
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"input": data.held_out_images})
    with torch.no_grad():
        expected = model(torch.from_numpy(data.held_out_images)).numpy()
    difference = float(np.abs(logits - expected).max())
    accuracy = float(np.mean(logits.argmax(axis=1) == data.held_out_labels))
    if path.stat().st_size >= MAX_FILE_BYTES:
        raise click.ClickException(f"{path}: {path.stat().st_size} bytes; make the model narrower")
    if difference > 1e-4:
        raise click.ClickException(f"{path}: logits differ from torch by {difference:.2g}; the export is wrong")
    if accuracy < recipe.least_accuracy:
        raise click.ClickException(f"{path}: accuracy {accuracy:.3f} is under {recipe.least_accuracy}; train longer")
    return accuracy


@click.command(help="Train and export the models that ship with qcompile, with their data.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(__file__).resolve().parent,
    help="Folder to write to; made where it does not exist. Default: the folder of this script.",
)
def main(out: Path) -> None:
    """Write data and models to `out`, each model checked in onnxruntime on the held-out samples."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    out.mkdir(parents=True, exist_ok=True)
    data = load_data()
    save_data(data, out)
    for recipe in RECIPES:
        model = train(recipe, data)
        path = out / f"{recipe.name}.onnx"
        onnx.save_model(export(model, recipe.name), path)
        accuracy = verify(recipe, model, path, data)
        click.echo(f"{path}: {path.stat().st_size} bytes, held-out accuracy {100 * accuracy:.1f} %")


if __name__ == "__main__":
    main()
