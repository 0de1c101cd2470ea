"""Check a model class against the contract: python -m scripts.conformance my_model:Doubler

A class with forward is batched, one with begin and step is stepped.
Exit status: 0 all checks passed, 1 a check failed, 2 the class can't be loaded.
"""

import argparse
import json
import sys
from collections.abc import Sequence

from deployments.runtime.adapter import ModelClassError, load_class
from deployments.runtime.conformance import check_model
from deployments.runtime.step_conformance import check_step_model
from deployments.runtime.stepwise_class import is_stepwise


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="conformance", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="module:Class, found as the server finds it")
    parser.add_argument("--model-args", default="{}", help="its keyword arguments, a JSON object")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max-batch-size", type=int, default=8, help="of a batch, or of a step")
    options = parser.parse_args(argv)
    try:
        model_args = json.loads(options.model_args)
    except ValueError as error:
        parser.error(f"--model-args is not JSON: {error}")
    if not isinstance(model_args, dict):
        parser.error("--model-args must be a JSON object")
    try:
        model_class = load_class(options.model)
        check = check_step_model if is_stepwise(model_class) else check_model
        report = check(model_class, model_args, device=options.device, max_batch_size=options.max_batch_size)
    except ModelClassError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(report.lines()))
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.path.insert(0, "")  # the server's own rule: the model's file lies where it is started
    sys.exit(main())
