"""Each Triton kernel, as the ops launch it, compiled for an A100 and an H100: spills, shared memory, tensor cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

FOLDER = Path(__file__).parent
KERNELS = FOLDER.parent / "kernels"
CHIPS = {80: 163 * 1024, 90: 227 * 1024}
"""Compute capability -> bytes of shared memory that one block may have."""
KNOWN_SPILLS = {("3.6.0", "_partial_stats_kernel", "pointers float32"): 16}
"""Bytes a thread by version of Triton: float32 rows whose stride no TMA takes, which no head of a model has."""


@pytest.fixture(scope="module")
def compiled(pytestconfig):
    """Chip -> what tests/compiled.py prints; both side by side, and never in the interpreter.

    What Triton has made stays in .pytest_cache: a kernel that has not changed since the last time is compiled once.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(pytestconfig.cache.mkdir("triton"))}
    running = {chip: subprocess.Popen([sys.executable, "-P", FOLDER / "compiled.py", str(chip)], env=environment,
                                      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for chip in CHIPS}
    results = {}
    for chip, process in running.items():
        out, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors
        results[chip] = json.loads(out)
    return results


def rows(compiled, chip, condition=lambda row: True):
    found = [row for row in compiled[chip]["found"] if "error" not in row and condition(row)]
    assert found
    return found


def multiplies(row):
    return row["kernel"] in ("_partial_stats_kernel", "_partial_kl_kernel")


@pytest.mark.parametrize("chip", CHIPS)
def test_all_launches_compile(compiled, chip):
    errors = [row for row in compiled[chip]["found"] if "error" in row]
    assert not errors, "\n".join(f"{row['kernel']}, {row['case']}: {row['error']}" for row in errors)


@pytest.mark.parametrize("chip", CHIPS)
def test_no_kernel_is_left_out(compiled, chip):
    """A new kernel needs a launch in compiled.py; its modules are all the files that define one."""
    assert {row["kernel"] for row in rows(compiled, chip)} == set(compiled[chip]["kernels"])
    written = {line.split("(")[0].removeprefix("def ") for path in KERNELS.rglob("*.py")
               for line in path.read_text().splitlines() if line.startswith("def ") and "_kernel(" in line}
    assert set(compiled[chip]["kernels"]) == written


@pytest.mark.parametrize("chip", CHIPS)
def test_shipped_shapes_do_not_spill(compiled, chip):
    spills = [f"{row['kernel']}, {row['case']}, {row['constants']}: {row['stack']} bytes"
              for row in rows(compiled, chip) if row["local"] or row["stack"] > KNOWN_SPILLS.get(
                 (triton.__version__, row["kernel"], row["case"]), 0)]
    assert not spills, "\n".join(spills)


@pytest.mark.parametrize("chip", CHIPS)
def test_shared_memory_fits(compiled, chip):
    for row in rows(compiled, chip):
        assert row["shared"] <= CHIPS[chip], row


@pytest.mark.parametrize("chip", CHIPS)
def test_products_run_on_tensor_cores(compiled, chip):
    """wgmma on Hopper, mma.sync on Ampere, and for float32 neither, because its tensor cores round to tf32."""
    for row in rows(compiled, chip, multiplies):
        wanted = {"wgmma": chip == 90, "mma_sync": chip == 80}
        for name, on_this_chip in wanted.items():
            assert (row[name] > 0) == (on_this_chip and "float32" not in row["case"]), row


def test_both_ways_to_load_are_compiled(compiled):
    for chip, ways in ((80, {False}), (90, {False, True})):
        for shared in (False, True):
            aligned = rows(compiled, chip, lambda row, shared=shared: multiplies(row) and row["constants"]["EVEN_DIM"]
                           and row["constants"].get("SHARED", shared) == shared and "bfloat16" in row["case"])
            assert {(row["kernel"], row["constants"]["TMA"]) for row in aligned} == {
                (kernel, way) for kernel in ("_partial_stats_kernel", "_partial_kl_kernel") for way in ways}
