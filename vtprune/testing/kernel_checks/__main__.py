"""``python -m vtprune.testing.kernel_checks [cpu|cuda]``: runs all kernel checks and says which failed."""

from __future__ import annotations

import os
import sys
import time
import traceback

import torch


def main() -> int:
    """Exit code 0 if every check passed, 1 otherwise."""
    device = torch.device(
        sys.argv[1] if len(sys.argv) > 1 else "cuda" if torch.cuda.is_available() else "cpu"
    )
    if device.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
    from vtprune.testing.kernel_checks import all_checks

    start, number, failed = time.perf_counter(), 0, 0
    for name, check in all_checks():
        number += 1
        try:
            check(device)
        except Exception:  # noqa: BLE001 - counted and shown
            failed += 1
            print(f"FAILED {name}\n{traceback.format_exc()}")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu (Triton's interpreter)"
    print(
        f"kernel checks on {where}: {number - failed} passed, {failed} failed in {time.perf_counter() - start:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
