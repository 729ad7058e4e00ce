"""What is known of the machine that measures: its facts, its GPU's clocks, and the self-test that comes first."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from deimkit import shipping
from deimkit.__main__ import main
from deimkit.deploy import clocks, machine
from deimkit.deploy.bench import self_test
from deimkit.deploy.bench.self_test import Check, Question, passed
from deimkit.deploy.bench.timing import Clock
from deimkit.deploy.clocks import Observer, Sample, processes, query, verdict
from deimkit.deploy.machine import Gpu, Machine, hardware, processor_seconds, smi_name
from deimkit.errors import DeimkitError
from tests.still_clock import StillClock

# --------------------------------------------------------------------------------------------- a driver that says so

DRIVER = """#!/bin/sh
echo "$@" >> {log}
case "$*" in
  *clocks_throttle*) test {knows} = old || {{ echo 'Field is not a valid field to query.'; exit 2; }} ;;
esac
case "$*" in
  *compute-apps*) printf '{apps}' ;;
  *-lms*) while true; do echo '1200, 5001, 84, [N/A], 97, 0x0000000000000024'; sleep 0.02; done ;;
  *clocks.sm*) echo '1590, 5001, 45, 31.20, 0, 0x0000000000000001' ;;
  *driver_version*) echo '580.95.05, 70.00, [Not Supported]' ;;
esac
"""

Driver = Callable[..., Path]


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Puts an `nvidia-smi` on the PATH that knows one name of a field, and lists these processes; returns its log."""

    def install(knows: str = "old", apps: str = "") -> Path:
        log, program = tmp_path / "asked.txt", tmp_path / "nvidia-smi"
        program.write_text(DRIVER.format(log=log, knows=knows, apps=apps))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return log

    return install


@pytest.fixture
def no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def t4(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch that sees a T4, as far as questions go."""
    properties = SimpleNamespace(
        name="Tesla T4", major=7, minor=5, total_memory=15_843_721_216, multi_processor_count=40, uuid="aa-bb"
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: properties.name)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (15 * 10**9, 16 * 10**9))


# ------------------------------------------------------------------------------------------------------- machine


def test_this_machine_in_plain_values() -> None:
    told = json.loads(json.dumps(Machine.of().to_dict()))
    assert told["gpu"] is None and told["cores"] >= 1 and told["memory"] > 2**28 and told["processor"]
    assert told["versions"]["torch"] == torch.__version__.partition("+")[0] and "deimkit" in told["versions"]
    assert told["processor"] in str(Machine.of()) and hardware(torch.device("cpu")) == told["processor"]


def test_packages_that_are_not_there_have_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "PACKAGES", ("torch", "surely-nobody-calls-a-package-so"))
    assert set(machine.versions()) == {"deimkit", "torch"}


def test_a_gpu_is_asked_by_its_uuid(driver: Driver, t4: None) -> None:
    log = driver()
    found = Machine.of([torch.device("cpu"), torch.device("cuda", 1)]).gpu
    assert found == Gpu("Tesla T4", "7.5", 15_843_721_216, 40, torch.version.cuda, "580.95.05", 70.0, None)
    assert log.read_text().split()[-2:] == ["-i", "GPU-aa-bb"]
    assert str(found).startswith("Tesla T4 (compute 7.5, 15.8 GB, driver 580.95.05")
    assert hardware(torch.device("cuda")) == "Tesla T4"


def test_a_gpu_whose_driver_is_silent(no_driver: None, t4: None) -> None:
    found = Gpu.of(torch.device("cuda"))
    assert (found.driver, found.watts_limit, found.sm_mhz_limit) == (None, None, None)
    assert "nvidia-smi does not answer" in str(found)


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="Linux only")
def test_processors_work_for_us() -> None:
    before = processor_seconds()
    end = time.process_time() + 0.1
    while time.process_time() < end:
        sum(range(1000))
    after = processor_seconds()
    assert before is not None and after is not None
    total, busy, ours = (b - a for a, b in zip(before, after, strict=True))
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert ours >= 0.1 - 2 * tick and total >= busy - 2 * tick


# -------------------------------------------------------------------------------------------------------- clocks


@pytest.mark.parametrize("knows", ["old", "new"])
def test_a_gpu_is_watched_while_it_works(driver: Driver, knows: str) -> None:
    log = driver(knows)
    with Observer("GPU-aa-bb") as observer:
        deadline = time.monotonic() + 10
        while len(observer.samples) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
    first, *during, last = observer.samples
    assert first == Sample("before", 1590.0, 5001.0, 45.0, 31.2, 0.0, ("idle",))
    assert last.moment == "after" and len(during) >= 3
    slow = ("power cap", "thermal slowdown by the driver")
    assert set(during) == {Sample("during", 1200.0, 5001.0, 84.0, None, 97.0, slow)}
    asked = [line for line in log.read_text().splitlines() if "-lms" in line]
    assert len(asked) == 1 and ("clocks_event_reasons.active" in asked[0]) is (knows == "new")


def test_watching_ends_with_a_failure(driver: Driver) -> None:
    driver()
    observer = Observer("GPU-aa-bb")
    with pytest.raises(ZeroDivisionError), observer:
        raise ZeroDivisionError
    assert observer._process is not None and observer._process.poll() is not None
    assert observer._reader is not None and not observer._reader.is_alive()


def test_nothing_is_watched_without_a_driver(no_driver: None) -> None:
    with Observer("GPU-aa-bb") as observer:
        assert observer._process is None
    assert observer.samples == [] and verdict(observer.samples)[0] is None
    assert query("GPU-aa-bb", clocks.FIELDS) is None and processes("GPU-aa-bb") is None


def test_nothing_is_watched_without_a_gpu(driver: Driver) -> None:
    log = driver()
    with Observer(None) as observer:
        pass
    assert observer.samples == [] and not log.exists()


@pytest.mark.parametrize(
    "mask, limits",
    [
        ("0x0000000000000000", ()),
        ("0x0000000000000001", ("idle",)),
        ("0x0000000000000004", ("power cap",)),
        ("0x0000000000000048", ("hardware slowdown", "thermal slowdown by the hardware")),
        ("0x0000000000000102", ("application clocks", "display clocks")),
        (None, None),
    ],
)
def test_limits_are_read_from_their_bits(mask: str | None, limits: tuple[str, ...] | None) -> None:
    assert Sample.of("during", ["1", None, "3", "4.5", "5", mask]) == Sample("during", 1, None, 3, 4.5, 5, limits)


def test_a_verdict_names_ranges_and_reasons() -> None:
    def sample(mhz: float, *limits: str) -> Sample:
        return Sample("during", mhz, 5001.0, mhz / 20, None, 90.0, limits)

    samples = [sample(1590.0), sample(900.0, "power cap"), sample(1200.0, "power cap", "power brake")]
    slow, words = verdict(samples)
    assert slow is True
    assert words == "power cap in 2 of 3 samples, power brake in 1 of 3 samples; SM clock 900 to 1590 MHz; 45 to 80 °C"


def test_a_driver_that_tells_no_limits_proves_nothing() -> None:
    assert verdict([Sample("during", 1590.0, 5001.0, 45.0, 31.0, 0.0, None)])[0] is None


# ------------------------------------------------------------------------------------------------------ self-test


def by_name(checks: list[Check]) -> dict[str, Check]:
    found = {check.name: check for check in checks}
    assert len(found) == len(checks)
    return found


def test_without_a_gpu_only_the_host_is_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checks = self_test.self_test(smoke=lambda: "never", clock=StillClock())
    found = by_name(checks)
    assert checks[0].name == "GPU" and checks[0].ok is False and "nvidia-smi" in checks[0].remedy
    assert found["stopwatch"].ok is True and not passed(checks)
    untried = {name for name, check in found.items() if check.ok is None}
    assert untried == set(found) - {"GPU", "stopwatch"} and {"clocks", "TensorRT", "CUDA graph"} < untried
    assert str(checks[0]).startswith("FAILS      GPU: torch") and str(found["clocks"]).startswith("not tried")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shipping, "smoke", lambda detector, device: "never mind")


def test_a_gpu_that_is_not_found_is_told_of_under_auto(no_gpu: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--self-test"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "GPU" in line]
    assert line.startswith("not tried  GPU: torch") and "neither its clocks nor TensorRT were tried" in line
    assert all(word in line for word in ("install the driver", "built for a CUDA version", "CUDA_VISIBLE_DEVICES"))
    assert "GPU" not in by_name(shipping.can_bench("cpu")), "who asks for the CPU misses nothing"


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_gpu_that_is_asked_for_and_not_found_fails(
    no_gpu: None, capsys: pytest.CaptureFixture[str], device: str
) -> None:
    assert main(["bench", "--self-test", "--device", device]) == 1
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("FAILS      GPU: torch") and first.endswith("look at CUDA_VISIBLE_DEVICES.")
    assert sum("not tried" in line for line in rest) >= 5 and not any("->" in line for line in rest)


def test_a_device_that_no_machine_has_is_refused() -> None:
    with pytest.raises(DeimkitError, match="device must be"):
        shipping.can_bench("toaster")


def test_the_answers_are_written_where_asked(no_gpu: None, tmp_path: Path) -> None:
    out = tmp_path / "new" / "checks.json"
    assert main(["bench", "--self-test", "--device", "cpu", "--to", str(out)]) == 0
    assert [check["name"] for check in json.loads(out.read_text())] == ["processor", "stopwatch", "a small graph"]


def test_on_a_cpu_nothing_is_asked_of_a_gpu() -> None:
    checks = self_test.self_test("cpu", smoke=lambda: "3 boxes agree", clock=StillClock())
    assert passed(checks) and [check.name for check in checks] == ["processor", "stopwatch", "a small graph"]
    assert checks[2].detail == "3 boxes agree" and checks[2].remedy == ""
    assert json.loads(json.dumps([check.to_dict() for check in checks]))[2]["ok"] is True


def test_a_t4_that_is_well(driver: Driver, t4: None, monkeypatch: pytest.MonkeyPatch) -> None:
    driver(apps=f"{os.getpid()}\\n")
    monkeypatch.setattr(self_test, "_work", lambda device, clock: [])
    monkeypatch.setattr("deimkit.deploy.trt.library.tensorrt", lambda: SimpleNamespace(__version__="10.4.0"))
    checks = self_test.self_test(clock=StillClock())
    assert passed(checks), [str(check) for check in checks]
    found = by_name(checks)
    assert "Tesla T4" in found["GPU"].detail and found["TensorRT"].detail == "TensorRT 10.4.0"
    assert "clocks.sm 1590" in found["clocks"].detail and found["free memory"].detail == "15.0 GB of 16.0 GB are free"


@pytest.mark.parametrize(
    "apps, detail",
    [
        ("", "nobody else is seen"),
        ("{own}\\n", "nobody else is seen"),
        ("77\\n", "nobody else is seen"),  # in a container it is this process, by its number outside
        ("77\\n{own}\\n", "2 processes compute on it: 77"),
        ("77\\n78\\n", "2 processes compute on it: 77, 78"),
    ],
)
def test_others_on_the_gpu_are_seen(driver: Driver, t4: None, apps: str, detail: str) -> None:
    driver(apps=apps.format(own=os.getpid()))
    check = by_name(self_test.self_test(clock=StillClock()))["no one else on the GPU"]
    assert check.detail.startswith(detail) and check.ok is detail.startswith("nobody")


def test_what_fails_has_a_remedy_and_nothing_raises(no_driver: None, t4: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("CUDA error 35")

    def no_engine() -> str:
        raise ValueError("no kernel image")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (10**9, 16 * 10**9))
    monkeypatch.setattr("deimkit.deploy.trt.library.tensorrt", broken)
    monkeypatch.setattr(self_test, "_events", broken)
    monkeypatch.setattr(self_test, "_graph", broken)
    found = by_name(self_test.self_test(smoke=no_engine, clock=StillClock()))
    failing = {name for name, check in found.items() if check.ok is False}
    assert failing == set(found) - {"GPU", "stopwatch"}
    assert all(found[name].remedy.endswith(".") for name in failing)
    assert found["TensorRT"].detail == "RuntimeError: CUDA error 35"
    assert found["a small graph"].detail == "ValueError: no kernel image"


@pytest.mark.parametrize("late, ok", [(0.0, True), (0.005, True), (0.02, False), (-0.01, False)])
def test_a_stopwatch_that_is_wrong_is_noticed(late: float, ok: bool) -> None:
    class Late(StillClock):
        def rest(self, seconds: float) -> None:
            self.pass_by(seconds + late)

    check = by_name(self_test.self_test("cpu", clock=Late()))["stopwatch"]
    assert check.ok is ok and bool(check.remedy) is not ok


@pytest.mark.parametrize("share, ok", [(0.98, True), (0.6, True), (0.1, False), (1.5, False), (None, False)])
def test_two_clocks_that_disagree_are_noticed(share: float | None, ok: bool) -> None:
    class Busy(StillClock):
        def time(self, work: Callable[[], Any], device: torch.device) -> tuple[float, float | None]:
            self.pass_by(0.02)
            return 0.02, None if share is None else share * 0.02

    agree, detail = self_test._events(torch.device("cpu"), Busy())
    assert agree is ok and detail.startswith("20.00 ms by the wall")


def test_a_question_with_a_broken_answer_is_a_no() -> None:
    check = Question("driver", lambda: (True, str(1 // 0)), "Install it.").check()
    assert check == Check("driver", False, "ZeroDivisionError: integer division or modulo by zero", "Install it.")


@pytest.mark.gpu
def test_the_self_test_on_a_real_gpu() -> None:
    found = by_name(self_test.self_test("cuda", clock=Clock()))
    assert all(found[name].ok for name in ("GPU", "CUDA events beside the wall clock", "CUDA graph", "free memory"))
    assert smi_name(torch.device("cuda")).startswith("GPU-")
