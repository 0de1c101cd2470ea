"""Changes of an application's keys as edits of its config file's text.

Owns: where a value stands and what is put there; everything else of the file stays as it is, comments too. A
reason is a comment of its own above the line. Must not know: why. Positions are those that PyYAML gives each
node (Mark.index); no second YAML library for what a few splices do.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from serve_app.config_file import MODEL_DEPLOYMENT, ConfigError, check_file

MARK = "# tune"
"""Our comments begin with it; the next run replaces them."""


@dataclass(frozen=True, slots=True)
class Change:
    """One key. place: "args", or "deployment" for the model's entry; a dot leads into a mapping there.

    was: None where the key is not in the file. value: None takes nothing away, it is never written.
    """

    place: str
    key: str
    value: Any
    was: Any
    reason: str

    def text(self) -> str:
        return _scalar(self.value)


class CanNotWrite(Exception):
    """The file stays as it is; the text says why."""


@dataclass(frozen=True, slots=True)
class _Edit:
    """text[begin:end] becomes `new`."""

    begin: int
    end: int
    new: str


def lines(changes: Sequence[Change]) -> list[str]:
    """As they would stand in the file, for people to copy."""
    found = []
    for place in dict.fromkeys(change.place for change in changes):
        found.append("args:" if place == "args" else "deployments: the entry `model`:")
        for change in changes:
            if change.place == place:
                found += [
                    f"  {MARK}: {change.reason}",
                    f"  {change.key.replace('.', ': {')}: {change.text()}",
                ]
                found[-1] += "}" * change.key.count(".")
    return found


def check_writable(path: Path) -> None:
    """Raise CanNotWrite where nobody may write to it: before an hour is spent on measuring."""
    mode = path.stat().st_mode
    try:
        with path.open("r+b"):
            pass
    except OSError as error:
        raise CanNotWrite(f"{path} can't be written: {error.strerror}") from error
    if not mode & 0o222:  # root may, but was told not to
        raise CanNotWrite(f"{path} is read-only (chmod u+w {path})")


def write(path: Path, was: str, name: str, changes: Sequence[Change]) -> None:
    """Put the changes into the file. Raises CanNotWrite and leaves it as it is where that can't be done, or
    where it is not `was` any more."""
    check_writable(path)
    if path.read_bytes().decode("utf-8") != was:
        raise CanNotWrite(f"{path} was changed meanwhile")
    text = edited(was, name, changes)
    path.write_bytes(text.encode("utf-8"))
    try:
        check_file(path, path.resolve().parent)
    except ConfigError:
        try:
            check_file(path)
        except ConfigError as error:
            path.write_bytes(was.encode("utf-8"))
            raise CanNotWrite(f"with these changes the file would not pass the check: {error}") from error


def edited(text: str, name: str, changes: Sequence[Change]) -> str:
    """The text with the changes of application `name`. Raises CanNotWrite."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    entry = _entry(_value(root, "applications"), name)
    if entry is None:
        raise CanNotWrite(f"the file has no application {name!r}")
    edits: list[_Edit] = []
    for change in changes:
        mapping = _value(entry, "args")
        if change.place == "deployment":
            mapping = _entry(_value(entry, "deployments"), MODEL_DEPLOYMENT)
        *parents, key = change.key.split(".")
        for parent in parents:
            mapping = _value(mapping, parent)
        if not isinstance(mapping, yaml.MappingNode):
            raise CanNotWrite(
                f"{change.place} of {name!r} is no mapping of its own in the file; write it yourself"
            )
        _require_own(root, mapping, change)
        edits += _edits(text, mapping, key, change)
    done = text
    for edit in sorted(edits, key=lambda edit: (edit.begin, edit.end), reverse=True):
        done = done[: edit.begin] + edit.new + done[edit.end :]
    _require_same(text, done, name, changes)
    return done


def _edits(text: str, mapping: yaml.MappingNode, key: str, change: Change) -> list[_Edit]:
    newline = "\r\n" if "\r\n" in text else "\n"
    pair = next(((k, v) for k, v in mapping.value if k.value == key), None)
    if pair is not None:
        begin, end = pair[1].start_mark.index, pair[1].end_mark.index
        is_plain = isinstance(pair[1], yaml.ScalarNode) or pair[1].flow_style
        if not is_plain or not begin < end or _uses_alias(text, begin):
            raise CanNotWrite(f"{change.key} is no plain value in the file; write {change.text()} yourself")
        value = _Edit(begin, end, change.text())
        return [*_comment(text, pair[0].start_mark.index, change, newline), value]
    if mapping.flow_style:
        return _into_flow(text, mapping, key, change, newline)
    # Behind the key `model` or `name`, where everybody looks; in its column, on a line of its own.
    after = next((v for k, v in mapping.value if k.value in ("model", "name")), mapping.value[0][1])
    first = mapping.value[0][0].start_mark
    indent = " " * first.column
    at = _line_end(text, after.end_mark.index)
    added = f"{indent}{MARK}: {change.reason}{newline}{indent}{key}: {change.text()}"
    return [_Edit(at, at, newline + added)]


def _into_flow(text: str, mapping: yaml.MappingNode, key: str, change: Change, newline: str) -> list[_Edit]:
    """Before the closing brace."""
    close = mapping.end_mark.index - 1
    inner = text[:close].rstrip()
    comma = "" if inner.endswith((",", "{")) else ", "
    at = len(inner)
    space = " " if inner.endswith(",") else ""
    added = _Edit(at, at, f"{comma}{space}{key}: {change.text()}")
    return [*_comment(text, mapping.start_mark.index, change, newline), added]


def _comment(text: str, index: int, change: Change, newline: str) -> list[_Edit]:
    """Above the line of `index`, in the place of an earlier one of this key."""
    begin = text.rfind("\n", 0, index) + 1
    line = text[begin : _line_end(text, begin)]
    indent = " " * (len(line) - len(line.lstrip(" ")))
    ours = f"{indent}{MARK}: {change.reason}{newline}"
    previous = text.rfind("\n", 0, max(0, begin - 1)) + 1
    above = text[previous:begin]
    if re.match(rf"\s*{MARK}: {re.escape(change.key)} ", above):
        return [_Edit(previous, begin, ours)]
    return [_Edit(begin, begin, ours)]


def _uses_alias(text: str, begin: int) -> bool:
    """The value stands elsewhere (`key: *name`), or has an anchor that others use."""
    return text[begin - 1 : begin + 1].strip().startswith(("*", "&"))


def _line_end(text: str, index: int) -> int:
    """Of the line that holds `index`: where its newline (and a \\r before it) begins."""
    end = text.find("\n", index)
    end = len(text) if end < 0 else end
    return end - 1 if end > index and text[end - 1] == "\r" else end


def _value(mapping: Any, key: str) -> Any:
    if not isinstance(mapping, yaml.MappingNode):
        return None
    return next((value for node, value in mapping.value if node.value == key), None)


def _entry(sequence: Any, name: str) -> Any:
    """Of a list of mappings, the one with this name."""
    for entry in getattr(sequence, "value", ()):
        found = _value(entry, "name")
        if (found.value if found is not None else "default") == name:
            return entry
    return None


def _require_own(root: Any, mapping: yaml.MappingNode, change: Change) -> None:
    """An alias elsewhere would change with it."""
    if _uses(root, mapping) > 1:
        raise CanNotWrite(
            f"{change.place} is shared with another entry (a YAML anchor), which would change too; write "
            f"{change.key}: {change.text()} yourself"
        )


def _uses(node: Any, wanted: Any) -> int:
    if node is wanted:
        return 1
    if isinstance(node, yaml.MappingNode):
        return sum(_uses(value, wanted) for _, value in node.value)
    return sum(_uses(value, wanted) for value in node.value) if isinstance(node, yaml.SequenceNode) else 0


def _require_same(text: str, done: str, name: str, changes: Sequence[Change]) -> None:
    """Nothing but the changes may be different: whatever YAML can do that the splices don't know."""
    expected, found = yaml.safe_load(text), None
    for change in changes:
        entry = next(e for e in expected["applications"] if e.get("name", "default") == name)
        target = entry["args"] if change.place == "args" else _model_of(entry)
        *parents, key = change.key.split(".")
        for parent in parents:
            target = target[parent]
        target[key] = change.value
    try:
        found = yaml.safe_load(done)
    except yaml.YAMLError:
        pass
    if found != expected:
        raise CanNotWrite(
            "the file is written in a way that can't be edited in place; write the lines yourself"
        )


def _model_of(entry: Mapping[str, Any]) -> Any:
    return next(one for one in entry["deployments"] if one["name"] == MODEL_DEPLOYMENT)


def _scalar(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(str, value))}]"
    if isinstance(value, float) and value == int(value):
        return str(int(value))
    return str(value)
