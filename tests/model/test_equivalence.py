"""The path against transformers' own attention, on random models whose context is longer than top-k."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from evalkit.attention.cache import ARGUMENT
from evalkit.model.graft import graft

LENGTH = 96  # three times the models' top-k of 32


class Reference:
    """transformers' own forward pass, with the selections and expert choices it made."""

    def __init__(self, model: Any, ids: Tensor, **inputs: Any) -> None:
        self.selection: dict[int, Tensor] = {}
        self.routing: dict[int, Tensor] = {}
        hooks = []
        for number, layer in enumerate(model.model.layers):
            if getattr(layer.self_attn, "indexer", None) is not None:
                hooks.append(layer.self_attn.indexer.register_forward_hook(self._keep_selection(number)))
            if hasattr(layer.mlp, "gate"):
                hooks.append(layer.mlp.gate.register_forward_hook(self._keep_routing(number, ids.shape[0])))
        with torch.no_grad():
            self.logits = model(ids, **inputs).logits
        for hook in hooks:
            hook.remove()
        # GLM's shared layers attend what the last full layer selected.
        for number in range(len(model.model.layers)):
            self.selection.setdefault(number, self.selection.get(number - 1, torch.empty(0)))
        valid = inputs.get("attention_mask", torch.ones_like(ids)).bool()
        self.selection = {layer: _visible_only(found, valid) for layer, found in self.selection.items()}

    def _keep_selection(self, layer: int) -> Any:
        return lambda _module, _args, found: self.selection.__setitem__(layer, found.long())

    def _keep_routing(self, layer: int, batch: int) -> Any:
        return lambda _module, _args, found: self.routing.__setitem__(
            layer, found[2].unflatten(0, (batch, -1))
        )


def _visible_only(columns: Tensor, valid: Tensor) -> Tensor:
    """Top-k also returns masked columns where fewer than k are visible; here they become -1."""
    queries = torch.arange(columns.shape[1])[None, :, None]
    allowed = (columns <= queries) & valid.gather(1, columns.flatten(1)).view_as(columns)
    return columns.where(allowed & valid[:, :, None], -1)


def distance(got: Tensor, ref: Tensor) -> Tensor:
    """Relative L2 per token."""
    return (got.double() - ref.double()).norm(dim=-1) / ref.double().norm(dim=-1)


def prompt(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randint(2, 128, (batch, length), generator=torch.Generator().manual_seed(1))


class Scores:
    """Observes index scores and selections."""

    probes = frozenset({"index_scores", "selection"})

    def __init__(self) -> None:
        self.seen: dict[tuple[str, int], Tensor] = {}

    def tensor(self, probe: str, layer: int, value: Tensor) -> None:
        self.seen[probe, layer] = value

    def attention(self, layer: int, call: Any) -> None:
        pass


@pytest.mark.parametrize("yarn", [False, True], ids=["plain-rope", "yarn"])
class TestFloat32:
    def test_the_whole_prompt_equals_transformers_where_selections_agree(
        self, architecture: str, yarn: bool, make_model: Any
    ) -> None:
        model = make_model(architecture, yarn=yarn)
        reference = Reference(model, prompt())
        path = graft(copy.deepcopy(model), "fp32@reference")
        cache = path.evalkit.new_cache()
        cache.state.forced_selection = reference.selection
        with torch.no_grad():
            got = path(prompt(), **cache.argument).logits
        assert distance(got, reference.logits).max() <= 1e-5

    def test_selections_differ_from_transformers_only_at_near_ties(
        self, architecture: str, yarn: bool, make_model: Any
    ) -> None:
        model = make_model(architecture, yarn=yarn)
        reference = Reference(model, prompt(1))
        path = graft(copy.deepcopy(model), "fp32@reference")
        cache = path.evalkit.new_cache()
        cache.state.forced_selection = reference.selection  # so that every layer sees transformers' input
        cache.state.observer = scores = Scores()
        with torch.no_grad():
            path(prompt(1), **cache.argument)
        for layer in {layer for probe, layer in scores.seen if probe == "index_scores"}:
            table = scores.seen["index_scores", layer]
            for query in range(LENGTH):
                mine = set(_own_top(table[query]).tolist())
                theirs = set(reference.selection[layer][0, query].tolist()) - {-1}
                kth = table[query, sorted(mine)].min()
                gaps = [abs(float(table[query, column] - kth)) for column in mine ^ theirs]
                spread = float(table[query, : query + 1].abs().max())
                assert max(gaps, default=0.0) <= 1e-5 * max(spread, 1e-3), (layer, query, mine ^ theirs)

    def test_token_by_token_equals_the_whole_prompt(
        self, architecture: str, yarn: bool, make_model: Any
    ) -> None:
        path = graft(make_model(architecture, yarn=yarn), "fp32@reference")
        ids = prompt()
        with torch.no_grad():
            whole = path(ids).logits
            out = path(ids[:, :70])
            steps = [out.logits]
            for token in range(70, LENGTH):
                out = path(ids[:, token : token + 1], **out[ARGUMENT].argument)
                steps.append(out.logits)
        assert distance(torch.cat(steps, 1), whole).max() <= 1e-5

    def test_left_padding_changes_nothing(self, architecture: str, yarn: bool, make_model: Any) -> None:
        model = make_model(architecture, yarn=yarn)
        ids = prompt()
        mask = torch.ones_like(ids)
        mask[1, :30] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs = {"attention_mask": mask, "position_ids": positions}
        path = graft(copy.deepcopy(model), "fp32@reference")
        with torch.no_grad():
            batched = path(ids, **inputs).logits
            alone = path(ids[1:, 30:]).logits
        assert distance(batched[1:, 30:], alone).max() <= 1e-5
        reference = Reference(model, ids, **inputs)
        cache = path.evalkit.new_cache()
        cache.state.forced_selection = reference.selection
        with torch.no_grad():
            forced = path(ids, **cache.argument, **inputs).logits
        assert distance(forced, reference.logits)[mask.bool()].max() <= 1e-5


def _own_top(row: Tensor) -> Tensor:
    visible = int((row > -torch.inf).sum())
    return row.sort(descending=True, stable=True).indices[: min(32, visible)]


class TestBfloat16:
    def test_with_selection_and_routing_frozen_it_stays_near_float32(
        self, architecture: str, make_model: Any
    ) -> None:
        model = make_model(architecture).bfloat16().float()
        reference = Reference(model, prompt())
        path = graft(copy.deepcopy(model).bfloat16(), "bf16@reference")
        cache = path.evalkit.new_cache()
        cache.state.forced_selection = reference.selection
        cache.state.forced_routing = reference.routing
        with torch.no_grad():
            got = path(prompt(), **cache.argument).logits
        assert distance(got.flatten(0, 1).flatten(), reference.logits.flatten(0, 1).flatten()) <= 1e-2

    def test_free_running_it_is_no_farther_from_float32_than_transformers_own_bf16(
        self, architecture: str, make_model: Any
    ) -> None:
        mine = theirs = 0.0
        for seed in range(4):
            model = make_model(architecture, seed=seed).bfloat16().float()
            exact = Reference(model, prompt()).logits.flatten()
            narrow = copy.deepcopy(model).bfloat16()
            theirs += float(distance(Reference(narrow, prompt()).logits.flatten(), exact))
            with torch.no_grad():
                mine += float(distance(graft(narrow, "bf16@reference")(prompt()).logits.flatten(), exact))
        assert mine <= 1.1 * theirs


def test_on_a_cpu_query_rows_and_attention_are_rounded_to_bf16(make_model: Any) -> None:
    path = graft(make_model(), "bf16@reference", rounding=torch.bfloat16)
    seen: dict[str, Tensor] = {}

    class Calls(Scores):
        def attention(self, layer: int, call: Any) -> None:
            seen.update(q_latent=call.q_latent, q_rope=call.q_rope, out=call.out)

    cache = path.evalkit.new_cache()
    cache.state.observer = Calls()
    with torch.no_grad():
        path(prompt(), **cache.argument)
    assert seen.keys() == {"q_latent", "q_rope", "out"}
    assert all(torch.equal(x, x.bfloat16().float()) for x in seen.values())


def test_transformers_modules_keep_their_names_in_the_state_dict(architecture: str, make_model: Any) -> None:
    model = make_model(architecture)
    before = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in graft(model).state_dict().items()} == before
