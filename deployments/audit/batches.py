"""Whether an item's answer depends on who shares its batch, or on how far it is padded.

Owns: the crowds that an item is put in, and how far its answers may lie apart. Must not know: threads,
processes. Batches of one size run the same kernels, so equal bits under a swap of the mates prove
independence there; what differs by less than the dtype's rounding (routing without drops, a kernel that
blocks rows) is numerical coupling: told, not failed. Source: DESIGN, "The audit": alone against batched
1e-7 in fp32, up to 7e-3 for a GRU in bf16.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import permutations
from typing import Any

import torch

from deployments.audit.findings import Property
from deployments.audit.forks import CantCross, Isolate, here
from deployments.audit.instruments import watch_operators
from deployments.audit.randomness import seed_all
from deployments.audit.sameness import distance, same, snapshot
from deployments.audit.subject import Subject, distinct
from deployments.audit.target import Batch, Input
from deployments.runtime.modules import modules_of

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 5e-2, torch.float16: 1e-2}
LEAST = 10
"""Pairs of batches, however long they take: a mate swapped, copies, places, sizes and an outlier."""
SIZE = 4
LARGE = 8
FULL = 32
"""The default of max_batch_size."""

Pair = tuple[str, Batch, Batch]
"""What differs, a batch that begins with the item, another that holds it."""


class Crowds:
    """Items in different company. A random model is seeded before each call, and an item keeps its place in
    batches of one size: it draws the same numbers then, and company alone differs. isolate: every call is
    made in it; in forks a model that keeps something is not taken for one whose batch-mates matter. Raises
    CantCross where it does.
    """

    def __init__(
        self,
        subject: Subject,
        *,
        is_random: bool = False,
        isolate: Isolate = here,
        has_time: Callable[[], bool] = lambda: True,
    ) -> None:
        self._subject, self._is_random, self._has_time = subject, is_random, has_time
        self._isolate = isolate
        self._answers: dict[Batch, list[Any]] = {}
        self.tolerance: float = isolate(lambda: _tolerance(subject))

    def check_mates(self) -> Property:
        """`batch_invariant`."""
        subject = self._subject
        if not subject.can_batch:
            return Property(None, "the model takes one item at a time")
        tried, worst, evidence = self._compare_all(self._isolate(self._pairs))
        if evidence:
            evidence.sort(key=lambda one: -one["difference"])
            return Property(False, _says(evidence[0]), evidence[:6])
        if not tried:
            return Property(None, "no two examples can share a batch")
        if worst > 0.0:
            says = (
                f"numerical coupling of {worst:.1g}, below {self.tolerance:g}: kernels differ with the size"
            )
            return Property(True, says, [{"tried": tried, "largest_difference": worst}])
        return Property(True, f"equal bits in {tried} pairs of batches", [{"tried": tried}])

    def _pairs(self) -> list[Pair]:
        groups = [self._mates_of(item) for item in (Input(0), *self._unlike())]
        pairs = [*_pairs_of_batches(groups[0]), *_places_among(self._of_all_lengths())]
        return [*pairs, *(pair for group in groups[1:] for pair in _pairs_of_batches(group))]

    def check_padding(self) -> Property:
        """`padding_invariant`."""
        subject = self._subject
        if not subject.pads:
            return Property(None, "nothing is padded: only items of one shape share a batch")
        lengths: dict[int, Input] = self._isolate(self._by_length)
        if len(lengths) < 2:
            return Property(None, "the examples all have one length: give examples() of different lengths")
        ordered = [lengths[length] for length in sorted(lengths)]
        longest = ordered[-1]
        tried, worst, evidence = self._compare_all(
            ("padded to a longer mate's length", (item, item), (item, longest)) for item in ordered[:-1]
        )
        if evidence:
            return Property(False, _says(evidence[0]), evidence)
        if not tried:
            return Property(None, "items of different length can't share a batch")
        return Property(
            True, f"largest difference {worst:.1g} over {tried} lengths", [{"largest_difference": worst}]
        )

    def _by_length(self) -> dict[int, Input]:
        """An example of each length, all of which may share a batch."""
        subject, found = self._subject, dict[int, Input]()
        for one in (Input(number) for number in range(min(len(subject.examples), 8))):
            if subject.key(one) == subject.key(Input(0)):
                found.setdefault(subject.length(one), one)
        return found

    def _compare_all(self, pairs: Iterable[Pair]) -> tuple[int, float, list[dict[str, Any]]]:
        """How many pairs could be made, the largest difference, and those beyond the tolerance. LEAST pairs
        at least, the others while there is time.
        """
        tried, worst, evidence = 0, 0.0, []
        for what, one, other in pairs:
            if tried >= LEAST and not self._has_time():
                break
            found = self._compare(what, one, other)
            if found is None:
                continue
            tried += 1
            worst = max(worst, found["difference"])
            if found["difference"] > self.tolerance:
                evidence.append(found)
        return tried, worst, evidence

    def _unlike(self) -> list[Input]:
        return [
            one
            for one in distinct(self._subject)
            if not one.change and self._subject.key(one) != self._subject.key(Input(0))
        ]

    def _mates_of(self, item: Input) -> list[Input]:
        """The item, then others of its key and length: another example, other values, an outlier."""
        subject = self._subject
        found = [Input(n) for n in range(min(len(subject.examples), 8)) if n != item.example]
        found += [Input(item.example, change) for change in ("other", "x-100", "x100")]
        found += [Input(one.example, "x100") for one in found if not one.change]
        return [item, *(one for one in found if self._is_mate(item, one))]

    def _of_all_lengths(self) -> list[Input]:
        """Up to three that may share a batch, not all of one length; none where nothing is padded."""
        subject, first = self._subject, Input(0)
        if not subject.pads:
            return []
        mates = [
            Input(n)
            for n in range(min(len(subject.examples), 8))
            if subject.key(Input(n)) == subject.key(first)
        ]
        longest = max(mates, key=subject.length)
        shorter = [one for one in mates if subject.length(one) < subject.length(longest)]
        return [*shorter[:2], longest] if shorter else []

    def _is_mate(self, item: Input, other: Input) -> bool:
        subject = self._subject
        try:
            if (subject.key(other), subject.length(other)) != (subject.key(item), subject.length(item)):
                return False
            subject.call((item, other))
        except Exception:  # a changed input may be no input at all
            return False
        return True

    def _compare(self, what: str, one: Batch, other: Batch) -> dict[str, Any] | None:
        """How far the answers of one[0] and the same item in `other` lie apart; None where a batch can't be
        made.
        """
        item = one[0]
        if self._is_random and (len(one) != len(other) or other[0] != item):
            return None
        try:
            first = self._answer(one, 0)
            second = self._answer(other, other.index(item))
        except CantCross:  # it tells of nothing but the answer's class
            raise
        except Exception as error:  # a batch that fails tells of the batch, not of the item
            if len(other) == 1:
                return None
            return {
                "what": f"{what}: {type(error).__name__}: {error}"[:300],
                "difference": float("inf"),
                "batches": _names(one, other),
            }
        return {"what": what, "difference": _apart(first, second), "batches": _names(one, other)}

    def _answer(self, batch: Batch, index: int) -> Any:
        known = self._answers.get(batch)
        if known is None:
            known = self._answers[batch] = self._isolate(lambda: self._made(batch))
        return known[index]

    def _made(self, batch: Batch) -> list[Any]:
        seed_all(0)
        answers: list[Any] = snapshot(self._subject.call(batch))
        return answers


def _apart(one: Any, other: Any) -> float:
    """Of what forward gave; where that is the same, of what postprocess made of it. (Where it is not quite
    the same, a label may lie near a tie.)"""
    if same(one, other):
        return 0.0
    if isinstance(one, tuple) and len(one) == 2 and same(one[0], other[0]):
        return distance(one[1], other[1])
    return distance(one[0], other[0])


def _pairs_of_batches(mates: Sequence[Input]) -> list[Pair]:
    """The first of the mates in all kinds of company."""
    item, *others = mates
    outliers = [one for one in others if one.change.startswith("x")]
    plain = [one for one in others if one not in outliers]
    pairs: list[Pair] = []
    for number, mate in enumerate(plain[:3]):
        swap = plain[(number + 1) % len(plain)]
        if swap != mate:
            pairs.append(("another mate", (item, mate), (item, swap)))
        pairs += [
            ("mates that are copies of it", (item, *(mate,) * (SIZE - 1)), (item,) * SIZE),
            ("its place in the batch", (item, mate, mate, mate), (mate, mate, mate, item)),
            ("alone, and in a batch", (item,), (item, *(mate,) * (SIZE - 1))),
        ]
        if number == 0:
            pairs += _with_outliers(item, mate, outliers)
        pairs += [
            ("a larger batch of copies of its mate", (item, mate), (item, *(mate,) * (LARGE - 1))),
            ("a large batch of copies of it", (item, *(mate,) * (LARGE - 1)), (*(item,) * LARGE,)),
            ("a large batch, last", (item, *(mate,) * (LARGE - 1)), (*(mate,) * (LARGE - 1), item)),
            ("a full batch", (item, mate), (item, *(mate,) * (FULL - 1))),
        ]
    if not plain:
        pairs += [
            ("alone, and with a copy of itself", (item,), (item, item)),
            *_with_outliers(item, item, outliers),
        ]
    return pairs


def _with_outliers(item: Input, mate: Input, outliers: Sequence[Input]) -> list[Pair]:
    pairs: list[Pair] = []
    for outlier in outliers[:2]:
        pairs += [
            ("an outlier as its mate", (item, mate), (item, outlier)),
            ("an outlier before it", (item, mate), (outlier, item)),
            ("a large batch of outliers", (item, *(mate,) * (LARGE - 1)), (item, *(outlier,) * (LARGE - 1))),
        ]
    return pairs


def _places_among(mates: Sequence[Input]) -> list[Pair]:
    """Mates of different lengths in every order: all are padded to the longest each time, so that places
    alone differ."""
    what = "its place among mates of other lengths"
    return [
        (what, (item, *others), order)
        for item in mates
        for others in [[one for one in mates if one != item]]
        for order in permutations((item, *others))
        if order != (item, *others)
    ]


def _names(*batches: Batch) -> list[list[str]]:
    return [[str(item) for item in batch] for batch in batches]


def _says(found: dict[str, Any]) -> str:
    return f"an item's answer changed with {found['what']}: by {found['difference']:.2g} of its largest value"


def _tolerance(subject: Subject) -> float:
    """The coarsest that the model's weights are kept in, or its operators compute in (autocast)."""
    kinds = {p.dtype for _, module in modules_of(subject.instance) for p in module.parameters(recurse=False)}

    def look(func: Any, args: tuple[Any, ...], kwargs: Any) -> None:
        kinds.update(one.dtype for one in args if isinstance(one, torch.Tensor))

    with watch_operators(look):
        subject.call((Input(0),))
    return max((TOLERANCES[kind] for kind in kinds if kind in TOLERANCES), default=TOLERANCES[torch.float32])
