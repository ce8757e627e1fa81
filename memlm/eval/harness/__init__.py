"""memlm models in EleutherAI's lm-evaluation-harness, with contexts of any length in constant memory.

Needs lm_eval; importing this package registers the model as "memlm". `python -m memlm.eval.harness` is
the harness's own command line, which then knows `--model memlm`.
"""

from __future__ import annotations

from memlm.eval.harness.babilong_tasks import write_babilong_tasks
from memlm.eval.harness.model import NAME, HarnessModel

__all__ = ["NAME", "HarnessModel", "main", "write_babilong_tasks"]


def main() -> None:
    """The harness's own command line, knowing `--model memlm`."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
