"""Speech probabilities of frames to segments of speech.

Owns: the rules and their figures. Must not know: networks, audio. Source: silero-vad's
get_speech_timestamps with its defaults, of which this is the part without a longest segment.
"""

from collections.abc import Sequence

THRESHOLD = 0.5
END_THRESHOLD = 0.35  # speech goes on until the probability is below
MIN_SPEECH_S = 0.25
MIN_SILENCE_S = 0.1
PAD_S = 0.03


def find_segments(probabilities: Sequence[float], *, frame: int, rate: int) -> list[tuple[int, int]]:
    """(start, end) of each segment in samples, in order; they never overlap.

    frame: samples of one probability. rate: samples a second. The audio is len(probabilities) frames.
    """
    total = len(probabilities) * frame
    found = [
        (start, end)
        for start, end in _runs(probabilities, frame, MIN_SILENCE_S * rate)
        if end - start > MIN_SPEECH_S * rate
    ]
    return _padded(found, total, int(PAD_S * rate))


def _runs(probabilities: Sequence[float], frame: int, min_silence: float) -> list[tuple[int, int]]:
    runs: list[tuple[int, int]] = []
    start: int | None = None
    silent_since: int | None = None
    for index, probability in enumerate(probabilities):
        at = index * frame
        if probability >= THRESHOLD:
            start, silent_since = at if start is None else start, None
        elif probability < END_THRESHOLD and start is not None:
            silent_since = at if silent_since is None else silent_since
            if at - silent_since >= min_silence:
                runs.append((start, silent_since))
                start = silent_since = None
    if start is not None:
        runs.append((start, len(probabilities) * frame))
    return runs


def _padded(segments: list[tuple[int, int]], total: int, pad: int) -> list[tuple[int, int]]:
    """`pad` samples more on both sides, or half of a gap that is shorter than two of them."""
    padded = []
    for index, (start, end) in enumerate(segments):
        before = start - (segments[index - 1][1] if index else 0)
        after = segments[index + 1][0] - end if index + 1 < len(segments) else None
        left = min(start, pad) if index == 0 else (before // 2 if before < 2 * pad else pad)
        right = pad if after is None or after >= 2 * pad else after // 2
        padded.append((start - left, min(total, end + right)))
    return padded
