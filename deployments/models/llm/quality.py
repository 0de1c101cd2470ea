"""How near a changed network is to the one it came from, on the same texts: what a variant is judged by.

Owns: the measures and how the texts are read. Must not know: what was changed, or which error is allowed.
Source: perplexity as in Jelinek et al. (1977); agreement under teacher forcing: both read the same text, and
their best next tokens are compared after each of its prefixes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from deployments.engine.sequence import Sequence as Generated
from deployments.engine.sequence import Work
from deployments.models.llm.layout import arrange
from deployments.models.llm.network import Network
from deployments.models.llm.rows import RowStore

_PART = 128
"""Logits that are made at once: 25 MB for a vocabulary of 49,152."""


@dataclass(frozen=True, slots=True)
class Quality:
    """Of two networks on the same tokens. perplexity: of the first and the second; nan without a next token.

    agreement: share of places where both find the same token most probable. Cosines are those of the logits.
    """

    perplexity: tuple[float, float]
    agreement: float
    mean_cosine: float
    worst_cosine: float
    places: int


@torch.inference_mode()
def compare(first: Network, second: Network, texts: Iterable[Sequence[int]]) -> Quality:
    """Both read each text from its beginning, as one prompt; on a CPU. texts: token ids, one at least."""
    losses, same, cosines = [0.0, 0.0], 0, []
    followed = 0
    for tokens in texts:
        hidden = [_read(network, tokens) for network in (first, second)]
        for start in range(0, len(tokens), _PART):
            part = slice(start, start + _PART)
            logits = [net.logits(h[part]) for net, h in zip((first, second), hidden, strict=True)]
            same += int((logits[0].argmax(1) == logits[1].argmax(1)).sum())
            cosines.append(F.cosine_similarity(logits[0].double(), logits[1].double()))
            following = torch.tensor(tokens[start + 1 : start + 1 + _PART], dtype=torch.int64)
            if len(following):
                followed += len(following)
                for index in range(2):
                    losses[index] += float(
                        F.cross_entropy(logits[index][: len(following)], following, reduction="sum")
                    )
    every = torch.cat(cosines)
    first_loss, second_loss = (loss / followed if followed else math.nan for loss in losses)
    return Quality(
        (math.exp(first_loss), math.exp(second_loss)),
        same / len(every),
        float(every.mean()),
        float(every.min()),
        len(every),
    )


@torch.inference_mode()
def _read(network: Network, tokens: Sequence[int]) -> torch.Tensor:
    """Hidden states [T, H] after each token."""
    store = RowStore(network.shape, slots=1, blocks=1)
    one = Generated(payload=None, tokens=list(tokens), known=len(tokens), slot=0, blocks=[])
    layout = arrange([Work(one, 0, len(tokens), is_last=True, blocks=[])])
    positions = layout.positions()
    return network(torch.tensor(layout.ids()), positions, store.attention(layout, positions))
