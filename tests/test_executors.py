"""Where tasks run: the same numbers in one process, in local processes and on a Dask cluster, a lost worker included."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from passes_helpers import parse

from qcompile.cut_layer import LayerSpec
from qcompile.errors import InputError, PassError
from qcompile.executors import InProcess, workers
from qcompile.hessian import traces
from qcompile.probing import Study, measure_widths, probes


@pytest.fixture(scope="module")
def study() -> Study:
    random = np.random.default_rng(2)
    w, b = random.normal(size=(12, 5)).astype(np.float32), np.zeros(5, np.float32)
    model = parse("g (float[1,12] x) => (float[1,5] y) { y = Gemm (x, w, b) }", w=w, b=b)
    model.graph.node[0].name = "fc"
    feeds = [{"x": random.normal(size=(1, 12)).astype(np.float32)} for _ in range(6)]
    return Study(model.SerializeToString(), feeds, [None] * 6, [LayerSpec("fc", "Gemm", "linear", "w", "b", 1, 60, 5)])


@pytest.fixture(scope="module")
def alone(study: Study) -> tuple[Any, Any]:
    """What one process finds."""
    with workers(study) as pool:
        return traces(pool, 1, tolerance=1e-6, most=32), pool.map(measure_widths, [(0, (2, 4, 8))])


def test_local_processes_give_the_same_bits(study: Study, alone: tuple[Any, Any]) -> None:
    with workers(study, 2) as pool:
        assert (traces(pool, 1, tolerance=1e-6, most=32), pool.map(measure_widths, [(0, (2, 4, 8))])) == alone


def test_a_task_that_fails_says_why(study: Study) -> None:
    with workers(study) as pool, pytest.raises(IndexError):
        pool.map(probes, [(7, (0,), 0.1)])
    assert InProcess().submit(len, [1, 2]).result() == 2


def end_process(study: Study) -> None:
    os._exit(1)


def test_processes_that_die_are_an_error_with_advice(study: Study) -> None:
    with workers(study, 2) as pool, pytest.raises(PassError, match="use fewer with --workers"):
        pool.map(end_process, [()])


def test_bad_addresses_and_counts_are_refused(study: Study) -> None:
    with pytest.raises(InputError, match="--workers 0"), workers(study, 0):
        pass
    with pytest.raises(InputError, match="give one of them"), workers(study, 2, "tcp://127.0.0.1:1"):
        pass


def test_a_missing_dask_is_named(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "distributed", None)
    with pytest.raises(InputError, match=r"qcompile\[cluster\]"), workers(study, 1, "tcp://127.0.0.1:1"):
        pass


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two worker processes of one thread each."""
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as made:
        yield made


@pytest.mark.filterwarnings("ignore")
def test_a_cluster_gives_the_same_bits(cluster: Any, study: Study, alone: tuple[Any, Any]) -> None:
    with workers(study, 1, cluster.scheduler_address) as pool:
        assert pool.count == 2
        assert (traces(pool, 1, tolerance=1e-6, most=32), pool.map(measure_widths, [(0, (2, 4, 8))])) == alone


def probes_with_an_accident(study: Study, layer: int, indices: tuple[int, ...], step: float, marker: str) -> list[float]:
    """`probes`; the process that takes the sixth probe first is killed."""
    if 5 in indices and not os.path.exists(marker):
        with open(marker, "w"):
            pass
        os._exit(1)
    return probes(study, layer, indices, step)


@pytest.mark.filterwarnings("ignore")
def test_a_worker_killed_in_mid_run_loses_nothing(cluster: Any, study: Study, tmp_path_factory: pytest.TempPathFactory) -> None:
    marker = str(tmp_path_factory.mktemp("cluster") / "killed")
    calls = [(0, (i,), 0.01, marker) for i in range(16)]
    with workers(study, 1, cluster.scheduler_address) as pool:
        found = pool.map(probes_with_an_accident, calls)
    assert os.path.exists(marker)
    with workers(study) as pool:
        assert found == pool.map(probes, [call[:3] for call in calls])


@pytest.mark.filterwarnings("ignore")
def test_no_scheduler_at_the_address(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("distributed")
    monkeypatch.setattr("qcompile.executors._PATIENCE", "1s")
    with pytest.raises(InputError, match="no Dask scheduler answers"), workers(study, 1, "tcp://127.0.0.1:9"):
        pass
