"""The process in which files run: it outlives what happens to a job, and leaves nothing behind."""

import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

import graphs
import penjing
from penjing.devices.local import Local
from penjing.errors import PenjingError
from penjing.targets.onnxruntime import isolated, messages, runtime
from penjing.targets.onnxruntime.isolated import File, limited, running

SRC = Path(penjing.__file__).parents[1]
BATCH = np.random.default_rng(0).normal(size=(2, 3, 4, 4)).astype(np.float32)
linux = pytest.mark.skipif(not isolated.FORKS, reason="jobs are forked on Linux only")


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return graphs.doubling(tmp_path_factory.mktemp("graphs") / "double.onnx")


def works(path: Path) -> bool:
    ((found,),) = runtime.run(path, [BATCH])
    return np.array_equal(found, 2 * BATCH)


def server() -> psutil.Process:
    kept = isolated._kept.server
    assert kept is not None
    return psutil.Process(kept.process.pid)


@linux
@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_crash_is_an_error_of_one_job(double: Path, number: signal.Signals) -> None:
    assert works(double)
    before = server().pid
    with running(File(double)) as outputs_of:
        assert np.array_equal(outputs_of(BATCH)[0], 2 * BATCH)
        (job,) = server().children()
        job.send_signal(number)
        with pytest.raises(PenjingError, match=rf"killed by signal {int(number)} .*double\.onnx"):
            outputs_of(BATCH)
    assert works(double) and server().pid == before and not server().children()


@linux
def test_memory_that_is_not_there(double: Path, tmp_path: Path) -> None:
    graphs.hungry(tmp_path / "hungry.onnx", 2**31)
    assert works(double)
    server().rlimit(psutil.RLIMIT_AS, (4 * 2**30, -1))
    try:
        with pytest.raises(PenjingError, match=r"hungry\.onnx"):
            runtime.run(tmp_path / "hungry.onnx", [BATCH])
        with pytest.raises(PenjingError, match=r"hungry\.onnx"):
            Local().latency([double, tmp_path / "hungry.onnx"])
    finally:
        server().rlimit(psutil.RLIMIT_AS, (-1, -1))
    assert works(double)


def test_a_file_without_end_is_stopped(double: Path, tmp_path: Path) -> None:
    path = graphs.endless(tmp_path / "endless.onnx")
    message = r"took more than 0\.3 s .*endless\.onnx"
    with limited(0.3):
        with pytest.raises(PenjingError, match=message):
            runtime.run(path, [BATCH])
        with pytest.raises(PenjingError, match=message):
            Local().latency([double, path])
    with limited(3), pytest.raises(PenjingError, match="took more than 3 s"):
        Local().peak_rss(path)
    assert works(double)


def test_the_limit_does_not_count_what_the_caller_does_between_batches(double: Path) -> None:
    with limited(1.5), running(File(double)) as outputs_of:
        threading.Event().wait(1.6)
        assert np.array_equal(outputs_of(BATCH)[0], 2 * BATCH)


@linux
def test_the_server_is_started_again_when_it_died(double: Path) -> None:
    assert works(double)
    with running(File(double)) as outputs_of:
        outputs_of(BATCH)
        jobs = server().children()
        server().kill()
    for job in jobs:
        job.kill()
    assert works(double)


@linux
@pytest.mark.parametrize(
    "jobs", [50, pytest.param(1000, marks=pytest.mark.slow)], ids=["50", "1000"]
)
def test_many_jobs_leave_nothing(
    double: Path, tmp_path: Path, jobs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder := tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model")

    def figures() -> tuple[int, int, int]:
        return psutil.Process().num_fds(), server().num_fds(), len(server().children())

    works(double), runtime.kernels(double)
    before, memory = figures(), server().memory_info().rss
    for index in range(jobs):
        if index % 5 == 0:
            with pytest.raises(PenjingError):
                runtime.run(broken, [BATCH])
        else:
            assert works(double)
    assert runtime.kernels(double)["Mul"] == 1
    assert figures() == before
    assert server().memory_info().rss < memory + jobs * 2**14
    assert not [p for p in psutil.Process().children(True) if p.status() == psutil.STATUS_ZOMBIE]
    assert not list(folder.iterdir())


def test_jobs_of_several_threads(double: Path) -> None:
    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.append(works(double) and works(double)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 8


def test_where_processes_cannot_be_forked(double: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "FORKS", False)
    assert works(double)
    (row,) = Local().latency([double], runs=5)
    assert row.runs == 5
    with pytest.raises(PenjingError, match=r"none\.onnx"):
        runtime.run(double.with_name("none.onnx"), [BATCH])


def test_bytes_are_a_source_too(double: Path) -> None:
    assert np.array_equal(runtime.run(double.read_bytes(), [BATCH])[0][0], 2 * BATCH)
    with pytest.raises(PenjingError, match="the exported graph"):
        runtime.run(b"no model", [BATCH])


def test_relative_paths_are_those_of_now(double: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert works(double)
    monkeypatch.chdir(double.parent)
    assert works(Path("double.onnx"))


def test_the_process_imports_the_runtime_and_numpy_only() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(SRC)!r}); import numpy, onnxruntime; "
        "before = set(sys.modules); import penjing.targets.onnxruntime.worker; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(new - set(sys.stdlib_module_names) - {'numpy', 'onnxruntime'})"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", program], stdout=subprocess.PIPE, text=True
    )
    assert result.stdout.strip() == "{'penjing'}"


SCRIPT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell runs with &
print("main ran")
import numpy as np
from penjing.targets.onnxruntime import isolated
from penjing.targets.onnxruntime.isolated import File, running
import psutil
batch = np.ones((1, 3, 4, 4), np.float32)
def works():
    with running(File(sys.argv[1])) as outputs_of:
        return bool((outputs_of(batch)[0] == 2).all())
"""


def script(double: Path, more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT + more, str(double)]
    env = {**os.environ, "PYTHONPATH": str(SRC)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
    )


def lines(process: subprocess.Popen[str]) -> Iterator[str]:
    assert process.stdout is not None
    return (line.strip() for line in process.stdout)


@linux
def test_everything_ends_with_a_parent_that_is_killed(double: Path) -> None:
    more = """
with running(File(sys.argv[1])) as outputs_of:
    outputs_of(batch)
    server = psutil.Process(isolated._kept.server.process.pid)
    print(server.pid, server.children()[0].pid, flush=True)
    time.sleep(1000)
"""
    with script(double, more) as process:
        output = lines(process)
        assert next(output) == "main ran"
        pids = [psutil.Process(int(pid)) for pid in next(output).split()]
        assert all(pid.is_running() for pid in pids)
        process.kill()
    gone, alive = psutil.wait_procs(pids, timeout=120)
    assert len(gone) == 2 and not alive


@linux
def test_interrupts_do_not_reach_the_server(double: Path) -> None:
    more = """
assert works()
before = isolated._kept.server.process.pid
try:
    print("ready", flush=True)
    time.sleep(1000)
except KeyboardInterrupt:
    print(works(), before == isolated._kept.server.process.pid, flush=True)
"""
    with script(double, more) as process:
        output = lines(process)
        assert [next(output), next(output)] == ["main ran", "ready"]
        os.killpg(process.pid, signal.SIGINT)
        assert list(output) == ["True True"]
    assert process.returncode == 0


@linux
def test_a_fork_of_the_parent_has_its_own_server(double: Path) -> None:
    more = """
assert works()
mine = isolated._kept.server.process.pid
sys.stdout.flush()
pid = os.fork()
if pid == 0:
    ok = works() and isolated._kept.server.process.pid != mine
    isolated._kept.close()
    os._exit(0 if ok else 1)
print(os.waitpid(pid, 0)[1], works(), isolated._kept.server.process.pid == mine)
"""
    with script(double, more) as process:
        assert list(lines(process)) == ["main ran", "0 True True"]
    assert process.returncode == 0


@pytest.mark.parametrize(
    "array",
    [
        np.float32(3).reshape(()),
        np.zeros((0, 3), np.int64),
        np.array([True, False]),
        np.arange(6, dtype=np.float16).reshape(2, 3).T,
        np.array([1 + 2j]),
    ],
)
def test_messages_come_as_they_were_sent(array: np.ndarray) -> None:
    stream = io.BytesIO()
    messages.send(stream, {"a": "ü"}, [array, array])
    stream.seek(0)
    header, (found, again) = messages.receive(stream)
    assert header == {"a": "ü"} and found.dtype == array.dtype and found.shape == array.shape
    assert np.array_equal(found, array) and np.array_equal(again, array)


def test_a_torn_message_is_no_message() -> None:
    stream = io.BytesIO()
    messages.send(stream, {}, [np.arange(9)])
    for size in range(len(stream.getvalue())):
        with pytest.raises(EOFError):
            messages.receive(io.BytesIO(stream.getvalue()[:size]))
    with pytest.raises(PenjingError, match="object"):
        messages.send(stream, {}, [np.array(["text"], object)])
