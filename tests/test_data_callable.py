"""qcompile.data with Python functions: what they may give, how their faults are told, and the zoo's own loaders."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import pytest

from qcompile.data import InputInfo, load_dataset, model_inputs
from qcompile.data_callable import CallableSource
from qcompile.errors import DataError
from qcompile.runtime import Session

ZOO = Path(__file__).resolve().parents[2] / "shared" / "zoo"
X = InputInfo("x", ("N", 2), np.dtype(np.float32))
HEAD = "import numpy as np\ndef feed(i): return {'x': np.full((1, 2), i, np.float32)}\n"


def write(path: Path, text: str) -> Path:
    path.write_text(HEAD + textwrap.dedent(text))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "loader.py"


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("def f():\n for i in range(3): yield feed(i)", [None] * 3),
        ("def f():\n for i in range(3): yield feed(i), i + 5", [5, 6, 7]),
        ("def f(): return [feed(i) for i in range(3)]", [None] * 3),
        ("def f(): return ((feed(i), None) for i in range(3))", [None] * 3),
        ("def f(): return [[feed(i), np.array([i])] for i in range(3)]", [0, 1, 2]),
        ("def f(n=3, *more, key=1, **rest): return [feed(i) for i in range(n)]", [None] * 3),
        ("class f:\n def __iter__(self): return iter([feed(0), feed(1), feed(2)])", [None] * 3),
        ("f = lambda: map(feed, range(3))", [None] * 3),
        ("def f(): return [{'x': [[i, i]]} for i in range(3)]", [None] * 3),
    ],
    ids=[
        "generator",
        "pairs",
        "list",
        "pairs without label",
        "label array",
        "defaults",
        "class",
        "lambda",
        "nested lists",
    ],
)
def test_what_a_function_may_give(file: Path, text: str, labels: list[int | None]) -> None:
    data = load_dataset(f"{write(file, text)}:f", [X])
    assert data.count is None
    for _ in range(2):  # each iteration calls it again
        got = list(data)
        assert [s.label for s in got] == labels
        assert [float(s.feeds["x"][0, 1]) for s in got] == [0, 1, 2]
        assert all(s.feeds["x"].dtype == np.float32 for s in got)
    assert data.has_labels == (labels[0] is not None)


def test_a_sample_of_a_function_is_its_first_items_and_no_more_is_run(file: Path) -> None:
    text = """
        def f():
            for i in range(100):
                assert i < 2
                yield feed(i)
    """
    data = load_dataset(f"{write(file, text)}:f", [X], samples=2, seed=9)
    assert [float(s.feeds["x"][0, 0]) for s in data] == [0, 1]
    assert len(list(data.sample(1))) == 1
    assert len(list(data.sample(50))) == 2


def test_data_stream_one_item_at_a_time(file: Path) -> None:
    text = "made = []\ndef f():\n for i in range(10**9):\n  made.append(i)\n  yield feed(i)"
    iterator = iter(load_dataset(f"{write(file, text)}:f", [X]))
    next(iterator)
    next(iterator)
    (module,) = (m for n, m in sys.modules.items() if n.startswith("qcompile_data_loader_") and hasattr(m, "made"))
    assert module.made == [0, 1]
    del sys.modules[module.__name__]


def test_imports_beside_the_file_also_while_it_runs(file: Path) -> None:
    (file.parent / "beside_early.py").write_text("COUNT = 2\n")
    (file.parent / "beside_late.py").write_text("START = 4\n")
    text = """
        import beside_early
        def f():
            import beside_late
            for i in range(beside_early.COUNT):
                yield feed(i + beside_late.START)
    """
    before = list(sys.path)
    data = load_dataset(f"{write(file, text)}:f", [X])
    assert sys.path == before
    iterator = iter(data)
    next(iterator)
    assert sys.path == before  # the program's own imports between two samples are not touched
    assert [float(s.feeds["x"][0, 0]) for s in data] == [4, 5]


def test_dataclasses_work_in_the_file_and_its_name_hides_no_module(tmp_path: Path) -> None:
    text = "from dataclasses import dataclass\n@dataclass\nclass C:\n n: 'int' = 1\ndef f(): return [feed(C().n)]"
    data = load_dataset(f"{write(tmp_path / 'numpy.py', text).rename(tmp_path / 'onnx.py')}:f", [X])
    assert len(list(data)) == 1
    assert sys.modules["onnx"] is onnx


def test_a_module_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "my_data_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    write(package / "loader.py", "class Holder:\n @staticmethod\n def make(): return [feed(1)]")
    monkeypatch.chdir(tmp_path)
    data = load_dataset("my_data_package.loader:Holder.make", [X])
    monkeypatch.chdir("/")
    assert len(list(data)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(a, b=1): return []", "takes the argument 'a'; it must be callable without arguments"),
        ("def f(*, key): return []", "takes the argument 'key'"),
        ("f = [1]", "'f' is a list, not a function"),
        ("def ff(): return []", r"there is no 'f' in it; did you mean 'ff'\?"),
        (
            "import no_such_module_at_all",
            "importing it raised ModuleNotFoundError: No module named 'no_such_module_at_all'",
        ),
        ("1 / 0", "importing it raised ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit('stop')", "importing it raised SystemExit: stop"),
        ("def f(:", "importing it raised SyntaxError"),
    ],
    ids=["argument", "keyword", "no function", "no such name", "import", "exception", "exit", "syntax"],
)
def test_refused_on_loading(file: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"^{file}:f: {message}"):
        load_dataset(f"{write(file, text)}:f", [X])
    assert not [n for n, m in sys.modules.items() if getattr(m, "__file__", "") == str(file) and not hasattr(m, "feed")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(): raise ValueError('two\\nlines')", "calling it raised ValueError: two lines"),
        ("def f():\n yield feed(0)\n raise KeyError('k')", "asking it for sample 1 raised KeyError: 'k'"),
        (
            "def f():\n yield feed(0)\n yield feed(1), 3",
            "sample 1: some samples have a label and some have none",
        ),
        ("def f(): return None", "returned NoneType; it must yield feeds"),
        ("def f(): return feed(0)", "returned one dict; it must yield feeds"),
        ("async def f(): yield feed(0)", "returned async_generator; it must yield"),
        ("def f(): yield np.zeros((1, 2))", "sample 0: is a ndarray; yield a dict"),
        ("def f(): yield feed(0), 1, 2", "sample 0: is a tuple; yield a dict"),
        ("def f(): yield feed(0), 'cat'", "sample 0: label 'cat' is not a number"),
        ("def f(): yield {'xx': 1}", r"sample 0: 'xx' is no input .*did you mean 'x'\?"),
        ("def f(): yield {}", "sample 0: input 'x' of the model is missing"),
        ("def f(): yield {'x': np.zeros(2, np.float32)}", "sample 0: input 'x': .*add the batch axis"),
        ("def f(): return []", "it gave no sample"),
    ],
)
def test_refused_on_running(file: Path, text: str, message: str) -> None:
    data = load_dataset(f"{write(file, text)}:f", [X])
    with pytest.raises(DataError, match=message) as caught:
        list(data)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    if " raised " in message:
        assert caught.value.__cause__ is not None


def test_an_iterator_that_is_spent_after_one_run(file: Path) -> None:
    data = load_dataset(f"{write(file, 'once = iter([feed(0)])' + chr(10) + 'def f(): return once')}:f", [X])
    assert len(list(data)) == 1
    with pytest.raises(DataError, match="each call of the function must begin a new sequence"):
        list(data)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_such_package_x.y:f", "no module named 'no_such_package_x'"),
        ("json.no_such_part:f", r"no module named 'json\.no_such_part'"),
        ("json:lods", r"there is no 'lods' in it; did you mean 'loads'\?"),
        ("json:loads", "takes the argument 's'"),
        ("json.decoder.x y:f", "is no module name"),
    ],
)
def test_modules_that_cannot_be_used(spec: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_dataset(spec, [X])


def test_a_builtin_without_signature_is_tried() -> None:
    with pytest.raises(DataError, match="calling it raised"):
        list(load_dataset("builtins:iter", [X]))


def test_indices_of_a_function_are_not_known(file: Path) -> None:
    source = CallableSource(str(write(file, "def f(): return [feed(0)]")), "f")
    with pytest.raises(ValueError, match="no known indices"):
        next(source.rows([0]))


# --- the zoo ----------------------------------------------------------------------------------------------------------

TASKS = [
    "mobilenet_v1",
    "mobilenet_v2",
    "squeezenet",
    "resnet20_cifar10",
    "resnet8_cifar10",
    "minilm_sst2",
    "vit_mnist",
    "mnist_cnn",
]


@pytest.mark.zoo
@pytest.mark.skipif(not ZOO.is_dir(), reason="../shared/zoo is absent")
@pytest.mark.parametrize("task", TASKS)
def test_zoo_loaders_fit_the_zoo_models(task: str) -> None:
    inputs = model_inputs(onnx.load(ZOO / task / "model.onnx"))
    assert inputs
    session = Session(ZOO / task / "model.onnx", label=task, threads=1)
    assert [i.name for i in inputs if i.name in session.input_names] == [i.name for i in inputs]
    calibration = load_dataset(f"{ZOO}/tasks.py:{task}_calib", inputs, samples=2)
    evaluation = load_dataset(f"{ZOO}/tasks.py:{task}_eval", inputs, samples=8)
    assert not calibration.has_labels
    assert evaluation.has_labels
    assert len(list(calibration)) == 2
    right = [int(session.run(s.feeds)[session.output_names[0]].argmax()) == s.label for s in evaluation]
    assert len(right) == 8
    assert sum(right) >= 4


@pytest.mark.zoo
@pytest.mark.skipif(not ZOO.is_dir(), reason="../shared/zoo is absent")
def test_zoo_loader_of_another_model_is_refused() -> None:
    inputs = model_inputs(onnx.load(ZOO / "mnist_cnn" / "model.onnx"))
    with pytest.raises(DataError, match=r"'input' is no input of the model .*Input3"):
        list(load_dataset(f"{ZOO}/tasks.py:vit_mnist_calib", inputs, samples=1))
