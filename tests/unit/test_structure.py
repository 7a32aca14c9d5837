"""The packages of Coppice: imports go down only, files are short, and docs/architecture.md shows
the current packages.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import structure


def test_there_are_no_import_cycles_and_no_long_files() -> None:
    """Neither packages nor modules nor C files import in a cycle, and each file can be read in one
    sitting.
    """
    assert structure.structure().problems() == []


def test_the_table_in_the_page_is_current() -> None:
    """The table's arrows equal the code's; its line counts may be off by a tenth."""
    current, page = structure.structure().table(), structure.page_table()
    assert structure.arrows(page) == structure.arrows(current), "run tools/structure.py --write"
    counted = structure.lines(current)
    assert structure.lines(page) == pytest.approx(counted, rel=0.1), "run tools/structure.py --write"


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (
            {"a/x.py": "import coppice.b.y", "b/y.py": "from coppice.b import y\nimport coppice.a.z", "a/z.py": ""},
            "packages",
        ),
        ({"a/x.py": "import coppice.b.y", "b/y.py": "def f():\n    import coppice.a.z", "a/z.py": ""}, "packages"),
        ({"a/x.py": "from coppice.a import y", "a/y.py": "if True:\n    from coppice.a.x import f"}, "modules"),
        ({"a/x.py": "from coppice.a import y", "a/y.py": "def f():\n    from coppice.a.x import f"}, None),
        (
            {"a/x.py": "from coppice.a import y", "a/y.py": "if TYPE_CHECKING:\n    from coppice.a.x import f"},
            None,
        ),
        ({"a/x.h": '#include "y.h"', "a/y.h": '#include "x.h"'}, "C files"),
        ({"a/x.py": "\n" * 451}, "451 lines"),
        ({"a/x.c": "\n" * 451}, "451 lines"),
        ({"a/x.c": "\n" * 450}, None),
        ({"../../tests/fakes/x.py": "\n" * 451}, "tests/fakes/x.py has 451 lines"),
        ({"../../bench/x.py": "\n" * 451}, "451 lines"),
        ({"../../tools/x.h": "\n" * 451}, "451 lines"),
    ],
)
def test_the_check_detects_violations(files: dict[str, str], problem: str | None, tmp_path: Path) -> None:
    """The check detects cycles and long files; a deferred import is not a cycle of modules."""
    for name, text in files.items():
        path = tmp_path / "src" / "coppice" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = structure.structure(tmp_path).problems()
    assert [problem in line for line in found] == [True] if problem else found == []
