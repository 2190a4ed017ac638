"""A process that holds one vLLM engine and answers its parent: one JSON object a line on stdin and on stdout.

    {"do": "start", "launch": {…}}                         -> {"started": {…}}
    {"do": "generate", "prompts": [...], "logprobs": k}     -> {"answer": {…}} as they end
    {"do": "score", "spans": [...]}                        -> {"score": {…}} as they end
    {"do": "keep", "documents": [...], "decode": d, "layers": false, "operands": false} -> {"kept": {…}}, one file a document

and after each {"done": true}, {"refused": line} for what the caller can mend, or {"failed": line}. All else that is
printed, vLLM's log included, goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

from evalkit.errors import InputError
from evalkit.evaluate.engines import adapter, inside
from evalkit.evaluate.engines.stops import Stops

Send = Callable[[dict[str, Any]], None]


class Held:
    """The engine of this process, once it is started."""

    def __init__(self) -> None:
        self.llm: Any = None
        self.stop_ids: list[int] = []
        self.tokenizer: Any = None
        self.stops: dict[tuple[str, ...], Stops] = {}
        self.count = 0
        self.tensor_parallel = 1

    def start(self, message: dict[str, Any], send: Send) -> None:
        """Load the model; what it says of itself is the proof of the candidate's path."""
        from transformers import AutoTokenizer

        began = time.perf_counter()
        launch = message["launch"]
        self.stop_ids = message["stop_ids"]
        self.llm, said = adapter.start(launch)
        self.tokenizer = AutoTokenizer.from_pretrained(launch["checkpoint"])
        self.tensor_parallel = launch["tensor_parallel"]
        loaded = self.layers()
        if launch["scales"]:
            scales = {int(layer): scale for layer, scale in launch["scales"].items()}
            self.llm.apply_model(partial(inside.set_scales, scales=scales))
        said |= {"layers": self.layers(), "loaded_k_scales": [one["k_scale"] for one in loaded]}
        send({"started": said | {"start_s": time.perf_counter() - began}})

    def layers(self) -> list[dict[str, Any]]:
        """Every layer once: tensor-parallel ranks say the same of it, pipeline stages hold different ones."""
        found = [one for rank in self.llm.apply_model(inside.describe) for one in rank]
        return sorted({one["layer"]: one for one in found}.values(), key=lambda one: int(one["layer"]))

    def generate(self, message: dict[str, Any], send: Send) -> None:
        """Greedy answers, each sent when it ends; vLLM batches as it likes."""
        engine, pending = self.llm.llm_engine, {}
        for prompt in message["prompts"]:
            options = {"max_tokens": prompt["max_new"], "logprobs": message["logprobs"]}
            stops = self.stops.setdefault(
                tuple(prompt["until"]), Stops(self.tokenizer, self.stop_ids, prompt["until"])
            )
            pending[self.add(prompt["ids"], options)] = [prompt["id"], stops, 0]
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.request_id not in pending:
                    continue
                (place, stops, known), completion = pending[output.request_id], output.outputs[0]
                ids = list(completion.token_ids)
                end = stops.end(ids, known)
                pending[output.request_id][2] = len(ids)
                if end is None and not output.finished:
                    continue
                del pending[output.request_id]
                if not output.finished:
                    engine.abort_request([output.request_id])
                ids = ids if end is None else ids[: end + 1]  # a step may have brought more than one token
                answer = {"id": place, "ids": ids, "ended": "length" if end is None else "stop"}
                send({"answer": answer | _logprobs(completion.logprobs, ids)})

    def score(self, message: dict[str, Any], send: Send) -> None:
        """Log-likelihood of each continuation after its context, from the prompt's log-probabilities."""
        engine, pending = self.llm.llm_engine, {}
        for span in message["spans"]:
            ids = span["context"] + span["continuation"]
            pending[self.add(ids, {"max_tokens": 1, "prompt_logprobs": 1})] = span
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    span = pending.pop(output.request_id)
                    told = output.prompt_logprobs[len(span["context"]) :]
                    send({"score": {"id": span["id"]} | _score(told, span["continuation"])})

    def keep(self, message: dict[str, Any], send: Send) -> None:
        """One document at a time, so that every candidate computes in the same shapes; all of it is forced text.

        Its last `decode` tokens are generated, one by one, whatever the model makes of them.
        """
        self.llm.apply_model(partial(inside.watch, layers=message["layers"], operands=message["operands"]))
        try:
            for document in message["documents"]:
                send({"kept": {"id": document["id"]} | self.shown(document, message["decode"])})
        finally:  # what is asked next must not be forced, nor come after what failed
            self.llm.apply_model(inside.forget)
            if self.llm.llm_engine.has_unfinished_requests():
                self.llm.llm_engine.abort_request([f"evalkit-{self.count}"])

    def shown(self, document: dict[str, Any], decoded: int) -> dict[str, Any]:
        """Write one document's file; what is in it, and what vLLM says of its prompt's tokens."""
        end = len(document["ids"]) - decoded
        ids, forced = document["ids"][:end], document["ids"][end:]
        self.llm.apply_model(partial(inside.begin, forced=forced, prompt=end))
        # One more than is forced, so that the last of them is attended with.
        self.add(ids, {"max_tokens": decoded + 1, "prompt_logprobs": 0, "stop_token_ids": []})
        told: Any = None
        made: list[int] = []
        while self.llm.llm_engine.has_unfinished_requests():
            for output in self.llm.llm_engine.step():
                told = output.prompt_logprobs or told
                made = list(output.outputs[0].token_ids)
        taken = {"path": document["file"], "prompt": end, "decoded": decoded}
        found = self.llm.apply_model(partial(inside.take, **taken, tensor_parallel=self.tensor_parallel))
        if made[:decoded] != forced:
            raise ValueError(f"{made[:decoded]} was generated where {forced} is forced")
        shapes = next((shapes for shapes in found if "logits" in shapes), found[0])
        chosen = [told[place][token].logprob for place, token in enumerate(ids) if place]
        return {"shapes": shapes, "chosen": chosen, "process": os.getpid()}

    def add(self, ids: list[int], options: dict[str, Any]) -> str:
        """Queue one request of token ids; returns its name."""
        from vllm import SamplingParams
        from vllm.inputs.engine import tokens_input

        self.count += 1
        name = f"evalkit-{self.count}"
        options = {"stop_token_ids": self.stop_ids, "ignore_eos": True, "detokenize": False} | options
        params = SamplingParams(temperature=0.0, **options)
        self.llm.llm_engine.add_request(name, tokens_input(ids), params)
        return name


def _logprobs(told: Any, ids: list[int]) -> dict[str, Any]:
    """Of each generated token its log-probability, and those of the likeliest tokens where they were asked for."""
    if told is None:
        return {}
    steps = list(told)[: len(ids)]
    return {
        "logprobs": [step[token].logprob for step, token in zip(steps, ids, strict=True)],
        "top": [{str(token): one.logprob for token, one in step.items()} for step in steps],
    }


def _score(told: Any, continuation: list[int]) -> dict[str, Any]:
    nats, greedy = 0.0, True
    for step, token in zip(told, continuation, strict=True):
        nats += step[token].logprob
        # The likeliest token comes beside the wanted one; where both are one, it is alone.
        greedy &= step[token].logprob >= max(one.logprob for one in step.values())
    return {"nats": nats, "greedy": greedy}


def main() -> None:
    """Answer until stdin ends."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints must not come between the replies
    held = Held()

    def send(reply: dict[str, Any]) -> None:
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    for line in sys.stdin:
        message = json.loads(line)
        number = message["number"]

        def numbered(reply: dict[str, Any], number: int = number) -> None:
            send(reply | {"number": number})

        try:
            getattr(held, message["do"])(message, numbered)
        except InputError as error:
            numbered({"refused": str(error)})
        except Exception as error:  # noqa: BLE001  the parent says what it was, and this log has its traceback
            traceback.print_exc()
            said = str(error).strip().splitlines()
            numbered({"failed": f"{type(error).__name__}: {said[0] if said else ''}"})
        else:
            numbered({"done": True})


if __name__ == "__main__":
    main()
