"""An OpenAI-compatible server as an engine, against a real HTTP server in a thread."""

import itertools
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from evalkit.errors import EngineDiedError, InputError, TruncatedError
from evalkit.evaluate.engines import endpoint
from evalkit.evaluate.engines.base import Label, Prompt, Span
from evalkit.evaluate.engines.endpoint import UNSEEN, EndpointEngine
from evalkit.evaluate.engines.vllm import ANSWERS, PROOF

WRITES = "so it goes. And on"


class Server(ThreadingHTTPServer):
    """Writes WRITES after every prompt; `faults` change what it does."""

    def __init__(self, tokenizer, **faults):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokenizer, self.faults, self.asked = tokenizer, faults, []
        self.numbers = itertools.count(1)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def reply(self, value, status=200, headers=()):
        body = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        for name, said in dict(headers).items():
            self.send_header(name, said)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        faults = self.server.faults
        found = {
            "/version": {"version": "0.33.0"},
            "/v1/models": {"data": [{"id": name} | faults.get("card", {"max_model_len": 130}) for name in faults.get("models", ["nano"])]},
        }  # fmt: skip
        found |= faults.get("says", {})
        self.reply(found.get(self.path, {}), 200 if self.path in found else 404)

    def do_POST(self):
        server, faults = self.server, self.server.faults
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append(asked)
        if next(server.numbers) <= faults.get("fails", 0):
            said = faults.get("failure", {"error": "restarting"})
            return self.reply(said, faults.get("status", 503), faults.get("headers", ()))
        if "refuses" in faults:
            return self.reply({"error": faults["refuses"]}, 400)
        read = min(len(asked["prompt"]), faults.get("reads", 10**6))
        ids = server.tokenizer(WRITES)["input_ids"][: min(asked["max_tokens"], faults.get("writes", 10**6))]
        choice = {"finish_reason": "length", "text": server.tokenizer.decode(ids)}
        for stop in asked.get("stop") or []:
            if stop in choice["text"]:
                ids = ids[: server.tokenizer.decode(ids).index(stop) + len(stop)]
                choice = {"finish_reason": "stop", "text": server.tokenizer.decode(ids)}
        if not faults.get("text_only"):
            choice |= {"token_ids": ids, "logprobs": {"token_logprobs": [-0.5] * len(ids)}}
        if asked.get("echo"):
            shown = [None, *(-(token % 7) / 10 for token in asked["prompt"][1:]), -0.5]
            best = [None, *({"a": -0.1} for _ in shown[1:])]
            choice["logprobs"] = {"token_logprobs": shown, "top_logprobs": best}
        return self.reply({"choices": [choice], "usage": faults.get("usage", {"prompt_tokens": read})})


@pytest.fixture
def serve(tokenizer, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint, "WAIT_S", 0.01)
    servers = []

    def served(folder="endpoint", options=None, **faults):
        server = Server(tokenizer, **faults)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server, EndpointEngine(f"{server.url}/v1/", checkpoint, tmp_path / folder, **(options or {}))

    yield served
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def prompts(tokenizer):
    return [
        Prompt(label=Label("task", number), ids=tokenizer(text)["input_ids"], max_new=18, until=until)
        for number, (text, until) in enumerate([("one", ["."]), ("two", []), ("one", [])])
    ]


def test_it_answers_with_the_servers_token_ids_up_to_a_stop_string(serve, prompts, tokenizer):
    server, engine = serve()
    found = dict(engine.generate(prompts))
    assert [tokenizer.decode(found[place].ids) for place in range(3)] == ["so it goes.", WRITES, WRITES]
    assert [found[place].ended for place in range(3)] == ["stop", "length", "length"]
    assert list(found[0].logprobs) == [-0.5] * len(found[0].ids)
    assert all(one["temperature"] == 0 and isinstance(one["prompt"][0], int) for one in server.asked)
    assert dict(engine.generate(prompts)) == found
    assert len(server.asked) == 3


def test_text_is_tokenised_where_a_server_tells_no_ids(serve, prompts, tokenizer):
    _, engine = serve(text_only=True)
    found = dict(engine.generate(prompts))
    assert tokenizer.decode(found[0].ids) == "so it goes."
    assert found[0].logprobs is None


def test_it_scores_continuations_from_the_echo(serve, tokenizer):
    _, engine = serve()
    spans = [
        Span(label=Label(None, None), context=[4, 5], continuation=[8, 10]),
        Span(label=Label(None, None), context=[4, 5], continuation=[7, 8]),
    ]
    found = dict(engine.score(spans))
    assert found[0] == (pytest.approx(-0.4), False)
    assert found[1] == (pytest.approx(-0.1), True)


def test_a_cut_prompt_or_answer_is_anomalous(serve, prompts):
    _, engine = serve(reads=2)
    with pytest.raises(
        TruncatedError, match=r"ANOMALOUS: task document .* read 2 prompt tokens, 3 were sent"
    ):
        list(engine.generate(prompts))
    _, engine = serve("other", writes=4)
    with pytest.raises(TruncatedError, match=r"ANOMALOUS: .* stopped after 4 of 18 tokens"):
        list(engine.generate(prompts[1:2]))


@pytest.mark.parametrize("usage", [None, {}])
def test_a_server_that_does_not_say_what_it_read_is_refused(serve, prompts, usage):
    _, engine = serve(usage=usage)
    with pytest.raises(
        InputError, match=r"does not say how many prompt tokens it read \(usage\.prompt_tokens\)"
    ):
        list(engine.generate(prompts))


def test_a_server_that_comes_back_is_asked_again_and_nothing_twice(serve, prompts):
    server, engine = serve(fails=2)
    assert len(dict(engine.generate(prompts))) == 3
    keys = [json.loads(line)["key"] for line in (engine._kept.path).read_text().splitlines()[1:]]
    assert engine._kept.path.name == ANSWERS
    assert len(keys) == len(set(keys)) == 3
    server.faults["fails"] = 10**6
    _, gone = serve("gone", fails=10**6)
    with pytest.raises(EngineDiedError, match="no answer after 4 tries: HTTP 503"):
        list(gone.generate(prompts))


@pytest.mark.parametrize(
    "faults",
    [{"status": 429}, {"status": 408}, {"status": 200, "failure": "<html>busy</html>"}, {"status": 200, "failure": [1]}],
    ids=str,
)  # fmt: skip
def test_a_refusal_that_passes_is_no_refusal(serve, prompts, faults):
    server, engine = serve(fails=2, **faults)
    assert len(dict(engine.generate(prompts[:1]))) == 1
    assert len(server.asked) == 3
    _, never = serve("never", fails=10**6, **faults)
    with pytest.raises(EngineDiedError, match=rf"after 4 tries: HTTP {faults['status']}") as error:
        list(never.generate(prompts[:1]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stated", "waits"), [("2", True), ("0", False), ("61", False), ("Mon, 23 Nov 2026 07:00:00 GMT", False)]
)
def test_it_waits_as_long_as_a_server_asks_within_reason(serve, prompts, stated, waits):
    _, engine = serve(fails=1, status=429, headers={"Retry-After": stated})
    began = time.monotonic()
    assert len(dict(engine.generate(prompts[:1]))) == 1
    assert (time.monotonic() - began > 2) == waits


def test_a_failure_does_not_wait_for_what_would_be_asked_again(serve, prompts):
    """One request is to wait for half a minute when another ends the run."""
    server, engine = serve(fails=1, headers={"Retry-After": "30"}, refuses="prompt too long")
    began = time.monotonic()
    with pytest.raises(InputError, match="prompt too long"):
        list(engine.generate(prompts))
    assert time.monotonic() - began < 15
    assert len(server.asked) == 3


@pytest.mark.parametrize("said", ["0.33.0", "<html>", '"0.33.0"', "[]", ""], ids=repr)
def test_a_statement_that_is_no_json_object_is_none(serve, prompts, said, tmp_path):
    _, engine = serve(says={"/version": said, "/get_server_info": said})
    assert json.loads((tmp_path / "endpoint" / PROOF).read_text()).keys() == {"note", "url", "v1/models"}
    assert len(dict(engine.generate(prompts))) == 3
    with pytest.raises(InputError, match="serves none: name one of them"):
        serve("other", says={"/v1/models": said})


def test_what_a_server_stated_is_replaced_whole(serve, tmp_path, monkeypatch):
    """The run is killed while it writes it."""
    serve()
    before = (tmp_path / "endpoint" / PROOF).read_text()

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        serve()
    assert (tmp_path / "endpoint" / PROOF).read_text() == before


def test_what_asking_took_is_kept(serve, prompts):
    _, engine = serve()
    began = time.monotonic()
    list(engine.generate(prompts))
    took = time.monotonic() - began
    assert 0 < engine.seconds(prompts) < took
    assert engine.seconds(prompts[:1]) < engine.seconds(prompts)
    assert serve()[1].seconds(prompts) == engine.seconds(prompts), "as another process finds it"


def test_its_length_and_statements_are_the_servers_own(serve, tmp_path):
    _, engine = serve()
    assert engine.max_length == 128
    proof = json.loads((tmp_path / "endpoint" / PROOF).read_text())
    assert proof["version"] == {"version": "0.33.0"}
    assert proof["note"] == UNSEEN
    assert "get_server_info" not in proof
    assert serve("short", {"max_length": 100})[1].max_length == 98


@pytest.mark.parametrize(
    ("faults", "options", "refused"),
    [
        ({"card": {}}, {}, "does not say how long its contexts may be"),
        ({}, {"max_length": 131}, "max_length 131 is over the 130 tokens"),
        ({"models": ["a", "b"]}, {}, "serves a, b: name one of them"),
        ({}, {"model": "c"}, "serves nano: no c"),
    ],
)
def test_what_a_server_lacks_is_said(serve, faults, options, refused):
    with pytest.raises(InputError, match=refused):
        serve(options=options, **faults)


def test_no_server_and_a_refused_request_end_in_one_line(serve, prompts, checkpoint, tmp_path):
    with pytest.raises(InputError, match=r"no server answers at http://127\.0\.0\.1:9"):
        EndpointEngine("http://127.0.0.1:9", checkpoint, tmp_path)
    _, engine = serve(refuses="prompt too long")
    with pytest.raises(InputError, match=r"HTTP 400: .*prompt too long") as error:
        list(engine.generate(prompts))
    assert "\n" not in str(error.value)
