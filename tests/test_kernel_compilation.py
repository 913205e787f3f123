"""Every kernel, compiled for every kind of GPU there is a target for, on a machine without one.

What `pallas_kernels.devices` declares and what compilers say must agree; nothing may spill; and the
machine code must be for the architecture that was asked for.
"""

import dataclasses
import functools
import json
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import pytest
from cuda_wheels import needs_cuda_wheels

import pallas_kernels as pk
from qlora_jax import kernel_report
from qlora_jax.compile_only import CompilerError
from qlora_jax.kernel_report import Case, compile_case, implementations
from qlora_jax.targets import TARGETS, compile_for, find_target

pytestmark = needs_cuda_wheels
ROOT = pathlib.Path(__file__).parents[1]
# One target of each compute capability: what is compiled for one is compiled for all of it.
CAPABILITIES = {find_target(name).compute_capability: name for name in reversed(TARGETS)}
GPU_CASES = [
    (case, implementation)
    for case in (
        Case("quantize"),
        Case("dequantize"),
        Case("matmul", rows=1),
        Case("matmul_transposed", rows=16),
    )
    for implementation in implementations(case.operation)
]
# What compiles for sm_75 though it is declared unsupported there, and why.
COMPILE_UNDECLARED = {
    # Nobody runs or promises Mosaic GPU on it: T4 has Triton.
    ("quantize", "mosaic_gpu", "float16"),
    ("dequantize", "mosaic_gpu", "float16"),
    ("quantize", "mosaic_gpu", "bfloat16"),
    ("dequantize", "mosaic_gpu", "bfloat16"),
    # XLA leaves the product to cuBLAS, which serves bfloat16 from sm_80 on.
    ("matmul", "xla", "bfloat16"),
    ("matmul_transposed", "xla", "bfloat16"),
}
# Declared for the operation as a whole, and what declines it.
DECLINED = {
    # The product with the transposed weight takes tensor cores: a dense one takes over.
    ("matmul_transposed", "triton", "7.5"),
}


def variants(case):
    """Each way in which a call can differ from the base case, one at a time."""
    changes = [
        {"quant_type": "fp4"},
        {"quant_type": "int4"},
        {"block_size": 128},
        {"block_size": 1024},
        {"shape": (4098, 4032)},  # 63 * 64 columns, and rows that fit no tile
        {"shape": (6656, 6656)},
        {"shape": (8192, 22016)},
        {"double_quant": False},
    ]
    if case.operation in ("quantize", "dequantize"):
        changes += [{"dtype": "float32"}]
    else:
        changes += [{"rows": rows} for rows in (1, 3, 16, 64) if rows != case.rows]
    if case.operation == "matmul":
        changes += [{"rank": 64}]
    return [dataclasses.replace(case, **change) for change in changes]


def served_dtype(case, target):
    """The case in a dtype that there is on the target: sm_75 has no bfloat16."""
    old = find_target(target).device.architecture < (8, 0)
    dtype = "float16" if old and case.dtype == "bfloat16" else case.dtype
    return dataclasses.replace(case, dtype=dtype)


def check(case, implementation, target):
    """Compiles; answers whether the implementation served the case."""
    target = find_target(target)
    compiled = compile_case(case, implementation, target)
    if implementation == "xla":
        return True
    for code in compiled.kernels:
        sm = target.compute_capability.replace(".", "")
        assert re.fullmatch(rf"sm_{sm}a?", code.architecture), code
        assert code.spill_bytes == 0 and not {"STL", "LDL"} & code.opcodes().keys(), code
        assert code.shared_bytes <= target.shared_bytes_per_block, code
        assert code.occupancy(target) > 0, code
    assert bool(compiled.kernels) != bool(compiled.declined)
    return compiled.declined is None


def agree(case, implementation, target):
    """Fails where the declaration and the compiler differ, whichever way."""
    declared = case.supported(implementation, find_target(target))
    try:
        served = check(case, implementation, target)
    except CompilerError:
        if declared:
            raise
        return
    capability = find_target(target).compute_capability
    if (case.operation, implementation, capability) in DECLINED:
        assert not served
        return
    undeclared = (case.operation, implementation, case.dtype) in COMPILE_UNDECLARED
    assert served == declared or (capability == "7.5" and undeclared), (
        f"{implementation} {case} for {capability}: declared {declared}, compiles {served}"
    )


def test_there_are_five_kinds_of_gpu():
    assert sorted(CAPABILITIES) == ["7.5", "8.0", "8.6", "8.9", "9.0"]


@pytest.mark.parametrize("target", ["h100", "t4"])
@pytest.mark.parametrize(("case", "implementation"), GPU_CASES, ids=str)
def test_kernels_compile_for_the_newest_and_the_oldest(case, implementation, target):
    agree(served_dtype(case, target), implementation, target)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("target", CAPABILITIES.values())
@pytest.mark.parametrize(("case", "implementation"), GPU_CASES, ids=str)
def test_declared_and_compiled_are_the_same(case, implementation, target, dtype):
    agree(dataclasses.replace(case, dtype=dtype), implementation, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITIES.values())
@pytest.mark.parametrize(
    ("case", "implementation"),
    [(variant, name) for case, name in GPU_CASES for variant in variants(case)],
    ids=str,
)
def test_variants_compile_or_are_declined(case, implementation, target):
    """Formats, blocks, ragged shapes, rows: machine code, or the next implementation's turn."""
    case = served_dtype(case, target)
    if not case.supported(implementation, find_target(target)):
        pytest.skip("declared unsupported: test_declared_and_compiled_are_the_same")
    check(case, implementation, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", CAPABILITIES.values())
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("operation", kernel_report.OPERATIONS)
def test_plain_jax_compiles_where_it_is_declared(operation, dtype, target):
    agree(Case(operation, dtype=dtype, rows=16 if "matmul" in operation else 0), "xla", target)


@pytest.mark.parametrize(
    ("operation", "target", "kernel"),
    [
        ("quantize", "h100", "mosaic"),
        ("quantize", "t4", "triton"),
        ("dequantize", "h100", "mosaic"),
        ("dequantize", "rtx4090", "mosaic"),
        ("dequantize", "t4", "triton"),
        ("matmul", "h100", "mosaic"),
        ("matmul", "rtx4090", "triton"),
        ("matmul", "t4", "triton"),
    ],
)
def test_a_call_of_the_public_function_launches_one_kernel_of_ours(operation, target, kernel):
    case = served_dtype(Case(operation, rows=1 if operation == "matmul" else 0), target)
    keywords = {} if operation == "quantize" else {"shape": case.shape}
    if operation == "dequantize":
        keywords["dtype"] = jnp.dtype(case.dtype)
    call = functools.partial(getattr(pk, f"{operation}_4bit"), **keywords)
    text = compile_for(call, *case.arguments(), target=target).as_text()
    ours = re.findall(r'custom_call_target="\w*(mosaic|triton)\w*"', text)
    assert ours == [kernel]
    # Nothing but the kernel writes a dense weight.
    assert operation != "dequantize" or "fusion(" not in text


def run_report(*arguments):
    command = [sys.executable, ROOT / "scripts" / "kernel_report.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_report_prints_and_writes_the_facts(tmp_path):
    path = tmp_path / "kernels.json"
    result = run_report("--target=h200", "--operation=dequantize", f"--json={path}")
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    rows = json.loads(path.read_text())["kernels"]
    assert [row["implementation"] for row in rows] == ["mosaic_gpu", "triton"]
    for row in rows:
        assert row["target"] == "h200" and row["architecture"] == "sm_90a"
        assert row["spill_bytes"] == 0 and row["tensor_core"] == []
        # A weight costs a shift, a look-up, a product and its part of loads and stores at least.
        assert 3 < row["instructions_a_weight"] < 20
        assert f" {row['registers']} " in result.stdout
        assert f" {row['instructions_a_weight']:.2f} " in result.stdout


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--target=h10", "error: there is no GPU target 'h10'; did you mean 'h100'?"),
        pytest.param(
            "--json=no/such/folder/x.json",
            "error: --json=no/such/folder/x.json: there is no folder",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "--operation=matmull",
            "error: flag --operation=matmull: value should be one of",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_mistake_ends_the_report_with_one_message(argument, message):
    result = run_report(argument)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(message) and "Traceback" not in result.stderr
