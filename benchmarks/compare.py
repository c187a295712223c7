"""qcompile and onnxruntime.quantization side by side: accuracy, speed, compile time and memory, in one run.

    python benchmarks/compare.py [--task NAME]... [--tool NAME]... [--output benchmarks/RESULTS.md]

Every tool is run by its command line in a process of its own, from the same float file and calibration data. The written
models are then measured here with the same held-out data, and timed in turn on one thread, so that a machine whose speed
drifts is the same for all. A tool that fails has a row that says so.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import click
import onnx

from qcompile.accuracy import Accuracy, compare
from qcompile.audit import audit
from qcompile.data import Dataset, load_dataset, model_inputs
from qcompile.errors import QcompileError
from qcompile.latency import Latency, Ratio, measure_latency
from qcompile.runtime import Session

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent / "models"
ZOO = HERE.parents[1] / "shared" / "zoo"
ZOO_TASKS = "mobilenet_v1 mobilenet_v2 squeezenet resnet20_cifar10 resnet8_cifar10 minilm_sst2 vit_mnist mnist_cnn"
COLUMNS = (
    "tool", "top-1 %", "drop, points", "agreement", "SQNR dB", "ms", "speed-up (95 % interval)",
    "int8 weights", "size ratio", "compile s", "peak MB",
)  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A float model with the SPECs of its calibration data and of its held-out, labelled data."""

    name: str
    model: Path
    calibration: str
    evaluation: str


@dataclass(frozen=True)
class Tool:
    """A quantiser: `arguments` follow the Python interpreter; {model}, {out} and {data} are filled in."""

    name: str
    arguments: tuple[str, ...]

    def command(self, task: Task, out: Path) -> list[str]:
        """The command line that writes `out`."""
        filled = {"model": str(task.model), "out": str(out), "data": task.calibration}
        return [sys.executable, *(argument.format(**filled) for argument in self.arguments)]


@dataclass(frozen=True)
class Written:
    """What a tool did: `error` is the last line that it wrote before it failed, None where it succeeded."""

    seconds: float
    peak_rss_mb: float
    error: str | None


@dataclass(frozen=True)
class Row:
    """One line of a task's table; what could not be measured is None."""

    tool: str
    written: Written | None
    accuracy: Accuracy | None = None
    milliseconds: float | None = None
    speedup: Ratio | None = None
    integer_share: float | None = None
    size_ratio: float | None = None


def _ort(kind: str) -> Tool:
    script = str(HERE / "ort_quantise.py")
    return Tool(f"onnxruntime {kind}", (script, "{model}", "{out}", "--kind", kind, "--data", "{data}"))


def _qcompile(target: str, effort: str) -> Tool:
    settings = ("--bits", "8", "--data", "{data}", "--target", target, "--effort", effort)
    return Tool(f"qcompile {target} {effort}", ("-m", "qcompile", "{model}", "-o", "{out}", *settings))


TOOLS = {
    tool.name.replace(" ", "-"): tool
    for tool in (
        *(_qcompile(target, effort) for target in ("any", "vnni") for effort in ("default", "fast")),
        *(_ort(kind) for kind in ("u8s8", "default", "dynamic")),
    )
}


def available_tasks(zoo: Path) -> dict[str, Task]:
    """The shipped models, and those of `zoo` that are there."""
    shipped = [
        Task(name, MODELS / f"{name}.onnx", str(MODELS / "digits_calib.npz"), str(MODELS / "digits.npz"))
        for name in ("digits_cnn", "digits_vit")
    ]
    data = zoo / "tasks.py"
    more = [Task(name, zoo / name / "model.onnx", f"{data}:{name}_calib", f"{data}:{name}_eval") for name in ZOO_TASKS.split()]
    return {task.name: task for task in (*shipped, *more) if task.model.exists()}


def run_tool(tool: Tool, task: Task, out: Path) -> Written:
    """Let `tool` write `out`, in a process whose time and peak memory are measured."""
    command = [sys.executable, str(HERE / "run_measured.py"), *tool.command(task, out)]
    finished = subprocess.run(command, capture_output=True, text=True, check=True)
    told = json.loads(finished.stdout)
    error = None
    if told["status"] != 0 or not out.exists():
        lines = [line.strip() for line in told["stderr"].splitlines() if line.strip()]
        error = f"exit status {told['status']}: {lines[-1] if lines else 'no message'}"
    return Written(told["seconds"], told["peak_rss_mb"], error)


def measure(task: Task, tools: Sequence[Tool], folder: Path, samples: int | None, rounds: int, slot: float) -> list[Row]:
    """The float model's row, then one row a tool."""
    evaluation = load_dataset(task.evaluation, model_inputs(_read(task.model)), samples=samples)
    rows = [_check(task, "float", task.model, None, evaluation)]
    paths = [task.model]
    for number, tool in enumerate(tools):
        click.echo(f"{task.name}: {tool.name}", err=True)
        out = folder / f"{task.name}.{number}.onnx"
        written = run_tool(tool, task, out)
        row = Row(tool.name, written)
        if written.error is None:
            row = _check(task, tool.name, out, written, evaluation)
        rows.append(row)
        paths.append(out)
    runnable = [index for index, row in enumerate(rows) if row.accuracy is not None]
    feeds = next(iter(evaluation)).feeds
    latency = measure_latency([paths[i] for i in runnable], feeds, rounds=rounds, slot_seconds=slot, threads=1)
    return list(_timed(rows, runnable, latency))


def _check(task: Task, name: str, path: Path, written: Written | None, evaluation: Dataset) -> Row:
    """Accuracy, integer weights and size of one model; a model that onnxruntime refuses has failed."""
    try:
        accuracy = compare(Session(task.model, label=str(task.model)), Session(path, label=name), evaluation)
        found = audit(path)
    except QcompileError as error:
        if written is None:
            raise
        return Row(name, Written(written.seconds, written.peak_rss_mb, str(error)))
    weights = found.integer_weight_bytes + found.float_weight_bytes
    share = found.integer_weight_bytes / weights if weights else None
    return Row(
        name,
        written,
        accuracy,
        integer_share=share,
        size_ratio=path.stat().st_size / task.model.stat().st_size,
    )


def _timed(rows: Sequence[Row], runnable: Sequence[int], latency: Latency) -> Iterator[Row]:
    times = dict(zip(runnable, zip(latency.median_ms, latency.speedups, strict=True), strict=True))
    for index, row in enumerate(rows):
        milliseconds, speedup = times.get(index, (None, None))
        yield Row(
            row.tool,
            row.written,
            row.accuracy,
            milliseconds,
            speedup,
            row.integer_share,
            row.size_ratio,
        )


def _read(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def _cells(row: Row) -> list[str]:
    written, accuracy, speedup = row.written, row.accuracy, row.speedup
    cost = [
        _number(written.seconds if written else None, 1),
        _number(written.peak_rss_mb if written else None, 0),
    ]
    if accuracy is None:
        reason = (written.error if written else None) or "not measured"
        failed = f"failed: {reason}".replace("|", "\\|")[:200]
        return [row.tool, failed, *[""] * (len(COLUMNS) - 4), *cost]
    exact = accuracy.sqnr_db is None
    return [
        row.tool,
        _number(None if accuracy.quantised_score is None else 100 * accuracy.quantised_score, 1),
        _number(accuracy.drop_points, 1),
        _number(accuracy.top1_agreement, 3),
        "exact" if exact else _number(accuracy.sqnr_db, 1),
        _number(row.milliseconds, 3),
        "" if speedup is None else f"{speedup.median:.2f} ({speedup.low:.2f} to {speedup.high:.2f})",
        "" if row.integer_share is None else f"{100 * row.integer_share:.1f} %",
        _number(row.size_ratio, 2),
        *cost,
    ]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def markdown(results: dict[str, list[Row]], samples: int | None, rounds: int) -> str:
    """The whole report: what it was measured on, then one table a task."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("qcompile", "onnxruntime", "onnx", "numpy"))
    held_out = "all" if samples is None else f"at most {samples}"
    lines = [
        "# qcompile and onnxruntime.quantization side by side",
        "",
        "Written by `python benchmarks/compare.py`; do not edit.",
        "",
        f"- {versions}, Python {platform.python_version()}",
        f"- {_processor()}, {os.cpu_count()} processors",
        f"- Accuracy on {held_out} held-out samples against the float model; latency of the first sample on one thread, models "
        f"in turn, median of {rounds} rounds; compile time and peak memory of the tool's own process.",
    ]
    for task, rows in results.items():
        some = next(row.accuracy for row in rows if row.accuracy is not None)
        lines += [
            "",
            f"## {task} ({some.samples} samples)",
            "",
            _line(COLUMNS),
            _line(["---"] * len(COLUMNS)),
        ]
        lines += [_line(_cells(row)) for row in rows]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@click.command()
@click.option("--task", "names", multiple=True, help="Model to compare on, several times for several. [all there are]")
@click.option("--tool", "tools", multiple=True, type=click.Choice(list(TOOLS)), help="Tool to run. [all]")
@click.option("--samples", type=click.IntRange(1), help="Use at most so many held-out samples. [all]")
@click.option("--rounds", type=click.IntRange(1), default=15, show_default=True, help="Rounds of the latency.")
@click.option("--slot", type=click.FloatRange(0, min_open=True), default=0.1, show_default=True, help="Seconds a round.")
@click.option("--zoo", type=click.Path(path_type=Path), default=ZOO, show_default=True, help="Folder of more models.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=HERE / "RESULTS.md",
    show_default=True,
)
def main(
    names: tuple[str, ...],
    tools: tuple[str, ...],
    samples: int | None,
    rounds: int,
    slot: float,
    zoo: Path,
    output: Path,
) -> None:
    """Quantise models with qcompile and with onnxruntime's quantiser, and write one table for each."""
    tasks = available_tasks(zoo)
    unknown = sorted(set(names) - set(tasks))
    if unknown:
        raise click.BadParameter(f"{unknown[0]} is not there; there are {', '.join(tasks)}", param_hint="--task")
    chosen = [TOOLS[name] for name in dict.fromkeys(tools or TOOLS)]
    results: dict[str, list[Row]] = {}
    try:
        with tempfile.TemporaryDirectory(prefix="qcompile-compare-") as folder:
            for name in dict.fromkeys(names or tasks):
                results[name] = measure(tasks[name], chosen, Path(folder), samples, rounds, slot)
    except QcompileError as error:
        raise click.ClickException(str(error)) from error
    output.write_text(markdown(results, samples, rounds), encoding="utf-8")
    click.echo(str(output))


if __name__ == "__main__":
    main()
