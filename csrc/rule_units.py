"""Writes a translation unit for each rule of rules/registry.h: what setup.py, and a test, compile.

So rules are compiled in parallel, and a changed rule alone.
"""

from __future__ import annotations

import re
from pathlib import Path

CSRC = Path(__file__).parent

UNIT = """\
// Written by csrc/rule_units.py.
#include "{backend}/rule.h"
#include "rules/{header}.h"

namespace fusedreg::{backend} {{
const Rule& rule_{header}() {{
  static const Rule rule = make_rule<{struct}>();
  return rule;
}}
}}  // namespace fusedreg::{backend}
"""


def rules() -> list[tuple[str, str]]:
    """The header and the struct of each rule."""
    return re.findall(r"RULE\((\w+), (\w+)\)", (CSRC / "rules" / "registry.h").read_text())


def write(backend: str, folder: Path, suffix: str = "cpp") -> list[str]:
    """Writes the units of a backend where they have changed, and returns their paths. csrc is their include path."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for header, struct in rules():
        path = folder / f"{backend}_{header}.{suffix}"
        unit = UNIT.format(backend=backend, header=header, struct=struct)
        if not path.exists() or path.read_text() != unit:
            path.write_text(unit)
        paths.append(str(path))
    return paths
