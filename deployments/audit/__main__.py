"""One audit, or one verification of variants, as a process of its own: `python -m deployments.audit JOB OUT`.

Owns: the way of a job in and its report out, as JSON files. Must not know: why it is asked. The server that
an audit's processes are forked from lives as long as whoever runs the audit, 300 MB: no replica should keep
it.
`python -m scripts.audit` is the command for people.
"""

import json
import sys
from pathlib import Path
from typing import Any

from deployments.audit.audit import Audit, AuditFailed
from deployments.audit.target import Target
from deployments.audit.variant import verify


def main(job_file: str, out_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    fields = job["target"]
    target = Target(**{**fields, "optimise": tuple(fields["optimise"])})
    Path(out_file).write_text(json.dumps(_report(job, target), default=str))


def _report(job: dict[str, Any], target: Target) -> dict[str, Any]:
    if job["what"] == "variants":
        return verify(target, tuple(job["optimise"]), job["max_error"])
    try:
        return Audit(target, target.model, job["budget_s"]).run()
    except AuditFailed as error:
        return {"failed": str(error)}


if __name__ == "__main__":
    main(*sys.argv[1:])
