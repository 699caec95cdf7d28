"""For which GPUs the CUDA kernels can be built; setup.py asks."""

from __future__ import annotations

import re

# Kernels take their arguments as __grid_constant__, which is there from Volta on.
OLDEST = (7, 0)
OLDER_BY_NAME = "Kepler|Maxwell|Pascal"


def reason_against(listed: str | None, visible: list[tuple[int, int]]) -> str | None:
    """Why the kernels cannot be built for all of these, or None.

    Args:
        listed: ``TORCH_CUDA_ARCH_LIST``, as "7.0;8.6+PTX".
        visible: the compute capabilities of the GPUs that are there, which count where nothing is listed.
    """
    by_name: list[str] = []
    wanted = visible
    if listed and listed != "native":
        by_name = re.findall(OLDER_BY_NAME, listed)
        wanted = [(int(major), int(minor)) for major, minor in re.findall(r"(\d+)\.(\d)", listed)]
    older = [*by_name, *(f"{major}.{minor}" for major, minor in wanted if (major, minor) < OLDEST)]
    if not older:
        return None
    return (
        f"it needs GPUs of compute capability {OLDEST[0]}.{OLDEST[1]} or newer, and it was to be built for "
        f"{', '.join(dict.fromkeys(older))} too: set TORCH_CUDA_ARCH_LIST to newer ones, as '8.0;9.0+PTX', and install "
        "fusedreg again"
    )
