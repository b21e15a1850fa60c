"""Settings for all tests: one thread each, the same examples of hypothesis in every run, and Triton kernels in the interpreter where there is no GPU."""

import collections
import contextlib
import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel module is imported, so before any import of one.
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
with contextlib.suppress(ImportError):  # environments for lmms-eval have no hypothesis
    from hypothesis import settings

    settings.register_profile("same examples in every run", derandomize=True, deadline=None)
    settings.load_profile("same examples in every run")


@pytest.fixture(autouse=True)
def _cell(request: pytest.FixtureRequest) -> None:
    """Marks a test as evidence for a cell of the support matrix."""
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    model = next((parameters[k] for k in ("family", "encoder", "name") if k in parameters), None)
    if isinstance(model, str) and isinstance(parameters.get("method"), str):
        request.node.user_properties.append(("cell", (model, parameters["method"])))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Counts the cells of the support matrix that the tests of this run prove."""
    outcomes: dict[tuple[str, str], collections.Counter[str]] = {}
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, cell in getattr(report, "user_properties", ()):
                if name == "cell" and (outcome != "passed" or report.when == "call"):
                    outcomes.setdefault(tuple(cell), collections.Counter())[outcome] += 1
    if not outcomes:
        return
    from vtprune.testing.matrix import cells
    from vtprune.testing.zoo import ENCODERS, LVLMS

    passed, skipped, failed, unproven, proofs = 0, 0, [], [], []
    for model in LVLMS | ENCODERS:
        for method, support in cells(model).items():
            count = outcomes.get((model, method), collections.Counter())
            if count["failed"] or count["error"]:
                failed.append(f"{model} x {method}")
            elif not support.works:
                skipped += 1
            elif count["passed"]:
                passed += 1
                proofs.append(count["passed"])
            else:
                unproven.append(f"{model} x {method}")
    write = terminalreporter.write_line
    write(
        f"support matrix, {len(LVLMS)} vision-language models and {len(ENCODERS)} encoders: {passed} cells passed, "
        f"{skipped} skipped by declaration, {len(failed)} failed, {len(unproven)} without a test in this run"
    )
    if proofs:
        write(f"  {min(proofs)} to {max(proofs)} tests prove a cell, {sum(proofs)} in all")
    for cell in failed:
        write(f"  failed: {cell}")
