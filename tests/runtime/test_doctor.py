"""`partita doctor`: what it prints is what the native library says."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from runtime import _native, doctor


def run(capsys, *arguments):
    status = doctor.main(list(arguments))
    return status, capsys.readouterr().out


def run_process(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "runtime.doctor", *arguments],
        capture_output=True, text=True, timeout=60, env={**os.environ, **environment},
    )  # fmt: skip


def test_json_says_what_the_machine_has(capsys):
    status, out = run(capsys, "--json", "--seconds", "0.1")
    report = json.loads(out)
    assert status == 0
    assert report["cpu"]["active_isa"] == _native.active_cpu_isa()
    assert report["cpu"]["usable_cores"] == _native.usable_cores()
    assert report["cpu"]["flags"] == _native.cpu_flags()
    cores = _native.usable_core_ids()
    assert len(report["cpu"]["partitions"]) == min(len(cores) - 1, 7)
    for cut in report["cpu"]["partitions"]:
        assert cut["prefill"] + cut["decode"] == cores and cut["prefill"] and cut["decode"]
    assert report["cuda"] == _native.cuda_status()
    assert report["memory"]["total_bytes"] >= report["memory"]["available_bytes"] > 0
    assert report["peaks"]["num_threads"] == _native.usable_cores()
    for rate in ("int8_gops", "fp32_gflops", "read_gb_per_second"):
        assert report["peaks"][rate] > 0.01, rate
    assert report["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_the_device_libraries_are_described(capsys):
    report = json.loads(run(capsys, "--json", "--seconds", "0")[1])
    by_world = {library["world"]: library for library in report["device_libraries"]}
    assert set(by_world) == {"cuda", "simt"}
    for world, library in by_world.items():
        native = _native.gpu_library(world)
        assert library["kernels"] == native["kernels"] and library["compiled"] == native["compiled"]
        assert set(library["verified"]) == set(library["kernels"])
        assert all(0 <= library["verified"][family] <= count for family, count in library["kernels"].items())
        assert (library["reason"] is None) == (library["num_devices"] > 0)
        assert (library["partition_note"] is not None) == (library["num_devices"] > 0)
    text = "\n".join(doctor.render_gpu(report))
    assert "--device cuda" in text and "--device simt" in text
    if by_world["simt"]["compiled"]:
        assert f"{sum(by_world['simt']['kernels'].values())} kernels" in " ".join(text.split())
        assert "token_ids 1" in " ".join(text.split())


def test_every_choice_of_a_kernel_has_its_reasons(capsys):
    report = json.loads(run(capsys, "--json", "--seconds", "0")[1])
    assert report["peaks"] is None
    assert {(choice["weights"], choice["activations"]) for choice in report["kernels"]} == {
        (weights, activations) for weights in doctor.BLOCKS for activations in doctor.ACTIVATIONS
    }
    for choice in report["kernels"]:
        assert any(reason.startswith(f"{choice['kernel']}: chosen") for reason in choice["reasons"])


def test_the_report_fits_a_terminal_and_names_what_matters(capsys):
    status, out = run(capsys, "--seconds", "0.05", "--reasons")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 100
    for title in ("CPU", "Memory", "GPU", "Peaks, measured on", "Matmul kernels"):
        assert f"\n{title}" in out
    assert _native.active_cpu_isa() in out
    assert f"{_native.usable_cores()} usable" in out
    assert "tokens/s" in out
    assert ("50:50" if _native.usable_cores() % 2 == 0 else "--lanes") in out
    assert all(": chosen" not in text for text in out.split("Matmul kernels")[0].splitlines())


def test_reasons_are_short_unless_asked_for(capsys):
    short, every = run(capsys, "--seconds", "0")[1], run(capsys, "--seconds", "0", "--reasons")[1]
    assert short.count("why ") == 1
    assert every.count("why ") == len(doctor.BLOCKS) * len(doctor.ACTIVATIONS)


def test_a_forced_instruction_set_is_said():
    done = run_process("--seconds", "0", PARTITA_CPU_ISA="portable")
    assert done.returncode == 0
    assert "portable (forced by PARTITA_CPU_ISA; this CPU's best is" in done.stdout
    assert "_portable" in done.stdout.split("Matmul kernels")[1]


def test_what_keeps_the_engine_from_running_is_said():
    done = run_process(PARTITA_CPU_ISA="avx3")
    assert done.returncode == 1
    assert "Partita cannot run here: PARTITA_CPU_ISA: got 'avx3'" in done.stderr
    done = run_process("--json", PARTITA_CPU_ISA="avx3")
    assert done.returncode == 1
    assert "avx3" in json.loads(done.stdout)["error"]


def test_a_cpu_below_the_best_level_is_told_what_it_lacks():
    class Older:
        detected_cpu_isa = active_cpu_isa = staticmethod(lambda: "avx2")
        usable_cores = staticmethod(lambda: 1)
        usable_core_ids = staticmethod(lambda: [0])

        @staticmethod
        def cpu_flags():
            return {**dict.fromkeys(_native.cpu_flags(), True), "avx512bf16": False, "avx512vnni": False}

    if os.environ.get("PARTITA_CPU_ISA"):
        pytest.skip("PARTITA_CPU_ISA is set")
    cpu = doctor.describe_cpu(Older)
    assert cpu["why"] == "avx512 needs avx512vnni, avx512bf16"
    assert any("has not" in text for text in doctor.render_cpu(cpu))
    assert "one core cannot be cut" in " ".join(doctor.render_cpu(cpu))


def test_a_gpu_is_shown():
    gpu = {"name": "NVIDIA H100", "compute_capability": "9.0", "multiprocessors": 132, "memory_bytes": 80 * 2**30}
    status = {"compiled": True, "toolkit": "13.0", "targets": "80-virtual", "driver": "13.0", "reason": None}
    text = "\n".join(doctor.render_cuda({**status, "devices": [gpu]}))
    for part in ("NVIDIA H100", "9.0", "132 SMs", "80.0 GiB", "up to CUDA 13.0"):
        assert part in text


@pytest.mark.parametrize("seconds", ["nan", "-1", "inf", "x"])
def test_bad_seconds(capsys, seconds):
    with pytest.raises(SystemExit) as exit_info:
        doctor.main([f"--seconds={seconds}"])
    assert exit_info.value.code == 2
    assert "--seconds" in capsys.readouterr().err


def test_help_says_how_to_use_it(capsys):
    with pytest.raises(SystemExit) as exit_info:
        doctor.main(["--help"], prog="partita doctor")
    assert exit_info.value.code == 0
    out = capsys.readouterr().out
    for part in ("partita doctor --json", "PARTITA_CPU_ISA", "exit status", "--reasons"):
        assert part in out
