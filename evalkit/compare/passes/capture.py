"""Runs one decoder layer over one document and keeps what its probes saw, until the caller drops it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from evalkit.attention.state import AttentionCall

ATTENTION_PROBES: Final = frozenset(
    {"latent", "rope", "index_scores", "selection", "attention", "values", "output", "routing"}
)
# A forced selection leaves nobody to read the scores.
FROZEN_PROBES: Final = ATTENTION_PROBES - {"index_scores"}
PADS: Final = {"index_scores": -torch.inf, "selection": -1}  # probes whose width grows with the cache


@dataclass(eq=False)
class LayerPass:
    """One layer over one document of T tokens.

    hidden: [1, T, D], the layer's output. probes: name to [T, ...], see evalkit.attention.path. call: the
    attention of all T tokens as one call on the final cache, where calls were kept.
    """

    hidden: Tensor
    probes: dict[str, Tensor]
    call: AttentionCall | None

    def has_chosen(self, selection: Tensor | None, routing: Tensor | None) -> bool:
        """Whether it selected and routed by itself as it would be made to; None leaves it to itself."""
        forced = (("selection", selection), ("routing", routing))
        return all(value is None or torch.equal(value, self.probes[name]) for name, value in forced)


class Capture:
    """An observer that keeps the tensors of one layer, step after step."""

    def __init__(self, probes: frozenset[str], keep_calls: bool) -> None:
        self.probes = probes
        self.keep_calls = keep_calls
        self.parts: dict[str, list[Tensor]] = {}
        self.calls: list[AttentionCall] = []

    def tensor(self, probe: str, layer: int, value: Tensor) -> None:
        self.parts.setdefault(probe, []).append(value.detach())

    def attention(self, layer: int, call: AttentionCall) -> None:
        if self.keep_calls:
            self.calls.append(call)

    def joined(self) -> dict[str, Tensor]:
        """Each probe's steps as one tensor [T, ...], padded where a later step saw more keys."""
        return {name: _join(parts, PADS.get(name, 0)) for name, parts in self.parts.items()}

    def joined_call(self) -> AttentionCall | None:
        """All steps as one call: rows only ever get added to a cache, so its last state serves every step."""
        if len(self.calls) <= 1:
            return self.calls[0] if self.calls else None
        return replace(
            self.calls[-1],
            q_latent=torch.cat([call.q_latent for call in self.calls]),
            q_rope=torch.cat([call.q_rope for call in self.calls]),
            indices=_join([call.indices for call in self.calls], -1),
            out=torch.cat([call.out for call in self.calls]),
            lse=torch.cat([call.lse for call in self.calls]),
        )


def sharing(model: Any) -> list[bool]:
    """Whether each layer attends to what the last one with an indexer selected, having none itself."""
    count = model.config.num_hidden_layers
    kinds = getattr(model.config, "indexer_types", None) or ["full"] * count
    return [kind == "shared" for kind in kinds[:count]]


def run_layer(
    model: Any,
    index: int,
    hidden: Tensor,
    cache: Any,
    spans: Sequence[slice],
    *,
    probes: frozenset[str] = ATTENTION_PROBES,
    keep_call: bool = False,
    selection: Tensor | None = None,
    routing: Tensor | None = None,
) -> LayerPass:
    """Run decoder layer `index` on hidden [1, T, D], step by step, on an empty cache.

    Args:
        model: what `evalkit.load` returns.
        cache: from `model.evalkit.new_cache`; it says which candidate runs.
        spans: the steps, covering the T tokens in order.
        probes: what to keep of what the path shows.
        keep_call: keep the attention's queries, rows and result, for the rungs.
        selection: [T, K] columns to attend to instead of the layer's own choice; a layer without an indexer
            needs it.
        routing: [T, experts a token] to use instead of the router's choice.
    """
    layer, state, capture = model.model.layers[index], cache.state, Capture(probes, keep_call)
    if selection is not None:
        state.forced_selection = {index: selection[None]}
        for span in spans:  # what a layer without an indexer looks for, though the forced selection then wins
            state.keep_selection(index, span.start, selection[None, span])
    if routing is not None:
        state.forced_routing = {index: routing[None]}
    state.observer = capture
    outputs = []
    for span in spans:
        step = hidden[:, span]
        positions = torch.arange(span.start, span.stop, device=hidden.device)[None]
        out = layer(
            step,
            attention_mask=None,
            position_ids=positions,
            **cache.argument,
            position_embeddings=model.model.rotary_emb(step, position_ids=positions),
        )
        outputs.append(out[0] if isinstance(out, tuple) else out)
    state.observer = None
    return LayerPass(torch.cat(outputs, 1), capture.joined(), capture.joined_call())


def _join(parts: list[Tensor], pad: float) -> Tensor:
    if len(parts) == 1:
        return parts[0]
    width = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, width - part.shape[-1]), value=pad) for part in parts])
