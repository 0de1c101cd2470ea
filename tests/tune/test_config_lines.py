"""Edits of a config file: the keys change, everything else stays, and the file still passes the check."""

from pathlib import Path

import pytest
import yaml

from scripts.tune.config_lines import CanNotWrite, Change, check_writable, edited, lines, write

ROOT = Path(__file__).parents[2]
SIZE = Change("args", "max_batch_size", 64, 32, "max_batch_size 64: 32 is 0.9 times as fast")
SLOTS = Change("args", "slots", 2, None, "slots 2: 1.31 times (95 % between 1.24 and 1.38) what 1 slot gives")
REPLICAS = Change("deployment", "num_replicas", 2, 1, "num_replicas 2: 1.5 times what one process gives")

FLOW = """applications:
- name: other
  route_prefix: /other
  import_path: serve_app.builder:dynamic
  args: {model: "tests.user_models:Doubler"}
  deployments: [{name: model}]
- name: own   # mine
  route_prefix: /own
  import_path: serve_app.builder:dynamic
  args: {model: "tests.user_models:Doubler", max_batch_size: 32}  # as it was
  deployments: [{name: model, num_replicas: 1}]
"""


def without_ours(text: str) -> list[str]:
    return [line for line in text.splitlines() if not line.strip().startswith("# tune")]


def test_the_shipped_file_keeps_its_comments_and_passes_the_check(tmp_path: Path) -> None:
    text = (ROOT / "config.yaml").read_text()
    file = tmp_path / "config.yaml"
    file.write_text(text)
    change = Change("args", "max_batch_size", 8, 32, "max_batch_size 8: a test")
    threads = Change("args", "threads", 2, None, "threads 2: a test")
    write(file, text, "embed", [change, threads])
    done = file.read_text()
    assert yaml.safe_load(done)["applications"][0]["args"]["max_batch_size"] == 8
    assert yaml.safe_load(done)["applications"][0]["args"]["threads"] == 2
    assert yaml.safe_load(done)["applications"][1:] == yaml.safe_load(text)["applications"][1:]
    expected = text.replace("max_batch_size: 32", "max_batch_size: 8").splitlines()
    rest = [line for line in without_ours(done) if line != "      threads: 2"]
    assert rest == expected
    assert "      # tune: max_batch_size 8: a test\n      max_batch_size: 8\n" in done


def test_a_mapping_in_braces_is_edited_in_its_braces() -> None:
    done = edited(FLOW, "own", [SIZE, SLOTS, REPLICAS])
    assert '  args: {model: "tests.user_models:Doubler", max_batch_size: 64, slots: 2}  # as it was\n' in done
    assert "  deployments: [{name: model, num_replicas: 2}]\n" in done
    assert "- name: own   # mine\n" in done
    assert "    # tune" not in done  # in the column of the line below


def test_the_next_run_replaces_the_last_ones_reason() -> None:
    once = edited(FLOW, "own", [SIZE])
    again = Change("args", "max_batch_size", 16, 64, "max_batch_size 16: measured anew")
    twice = edited(once, "own", [again])
    assert twice.count("# tune: max_batch_size") == 1
    assert "measured anew" in twice


def test_line_ends_of_windows_stay() -> None:
    done = edited(FLOW.replace("\n", "\r\n"), "own", [SIZE, SLOTS])
    assert done.count("\n") == done.count("\r\n")
    assert done.replace("\r\n", "\n") == edited(FLOW, "own", [SIZE, SLOTS])


def test_what_an_anchor_shares_is_not_touched() -> None:
    shared = (
        FLOW.replace("- name: other", "- name: other")
        .replace(
            'args: {model: "tests.user_models:Doubler"}',
            'args: &a {model: "tests.user_models:Doubler", max_batch_size: 32}',
        )
        .replace('args: {model: "tests.user_models:Doubler", max_batch_size: 32}', "args: *a")
    )
    with pytest.raises(CanNotWrite, match="shared"):
        edited(shared, "own", [SIZE])


def test_a_file_that_changed_meanwhile_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(FLOW + "# somebody was here\n")
    with pytest.raises(CanNotWrite, match="changed meanwhile"):
        write(file, FLOW, "own", [SIZE])


def test_a_read_only_file_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(FLOW)
    file.chmod(0o444)
    with pytest.raises(CanNotWrite, match=r"read-only|Permission"):
        check_writable(file)


def test_what_would_not_pass_the_check_is_taken_back(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(FLOW)
    with pytest.raises(CanNotWrite, match="would not pass"):
        write(file, FLOW, "own", [Change("args", "slots", 1000, None, "slots 1000: too many")])
    assert file.read_text() == FLOW


def test_lines_to_copy_are_yaml() -> None:
    num_gpus = Change("deployment", "ray_actor_options.num_gpus", 0.5, 1, "num_gpus 0.5")
    shown = yaml.safe_load("\n".join(lines([SIZE, SLOTS])))
    assert shown == {"args": {"max_batch_size": 64, "slots": 2}}
    assert "  ray_actor_options: {num_gpus: 0.5}" in lines([num_gpus])
