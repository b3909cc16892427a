"""`runner` with an engine that fails in the step after a file has appeared, which it removes.

`python serve_with_faults.py FILE serve …`
"""

import sys
from pathlib import Path

from runner.cli import main
from runner.models.blas import load_blas

load_blas()

from runner.engine.engine import Engine  # noqa: E402
from runner.types import Completion  # noqa: E402


class Fault(BaseException):
    """Not even an Exception."""


def arm(file: Path) -> None:
    """Lets every engine fail once where the file is."""
    step = Engine.step

    def failing(self: Engine) -> list[Completion]:
        if file.exists():
            file.unlink()
            raise Fault("the test's own")
        return step(self)

    Engine.step = failing  # type: ignore[method-assign]


if __name__ == "__main__":
    arm(Path(sys.argv.pop(1)))
    main()
