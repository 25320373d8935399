"""The served page. References: dense activations decoded, and the model's own hooks."""

import json
import re
import socket
import threading
import time
from contextlib import contextmanager
from queue import Queue
from typing import Any

import pytest
import torch
import uvicorn
from conftest import D_MODEL, D_VOCAB, N_CTX
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from saes import HOOK_NAMES, random_acts, random_lens, random_sae, randomize
from starlette.responses import Response
from starlette.testclient import TestClient
from test_page import driven_page, result_of_browser

from sae_lens_multilayer import cli
from sae_lens_multilayer.analysis import Suite, prompt_acts
from sae_lens_multilayer.evaluation.edits import LatentEdit
from sae_lens_multilayer.evaluation.encoder import LayerEncoder
from sae_lens_multilayer.models.kinds import as_model
from sae_lens_multilayer.pictures.latents import USED
from sae_lens_multilayer.pictures.page import ReportContent, report_html
from sae_lens_multilayer.serving import explorer as explorer_module
from sae_lens_multilayer.serving.app import make_app
from sae_lens_multilayer.serving.explorer import Explorer, continue_text
from sae_lens_multilayer.text.prompts import Text

TEXT = "w7 w300 w12 w8 w45"


def stock_sae() -> Any:
    metadata = SAEMetadata(hook_names=HOOK_NAMES, model_name="tiny")
    config = StandardSAEConfig(
        d_in=D_MODEL,
        d_sae=64,
        metadata=metadata,
        normalize_activations="layer_norm",
        apply_b_dec_to_input=True,
    )
    sae = StandardSAE(config)
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn_like(sae.W_dec))
        sae.W_enc.copy_(sae.W_dec.T)
    return randomize(sae)


def lens_sae() -> Any:
    sae = random_sae()
    sae.lens = random_lens()
    return sae


@pytest.mark.parametrize("make_sae", [random_sae, lens_sae, stock_sae])
@pytest.mark.parametrize(
    ("kind", "value"),
    [("add", 3.0), ("set", 2.0), ("set", 0.0), ("scale", 3.0), ("reconstruct", 0.0)],
)
def test_an_edit_changes_one_activation_of_the_reconstruction(make_sae, kind, value):
    sae, x = make_sae(), random_acts(2, 6)
    own: Any = {} if make_sae is stock_sae else {"hook": 1}
    latent = int(sae.encode(x, **own)[:, 1:].sum((0, 1)).argmax())
    edit = LatentEdit(kind, [1], [latent], value, slice(1, None))
    ((hook, replace),) = edit.replacements(LayerEncoder(sae)).items()

    assert hook == 1
    found = replace(x)
    with torch.no_grad():
        acts = sae.encode(x, **own)
        assert (acts[..., latent] > 0).any()
        same = sae.decode(acts, **own)
        acts = sae.encode(x, **own)
        before = acts[..., latent]
        after = {"add": before + value, "scale": value * before}
        acts[..., latent] = after.get(kind, torch.full_like(before, value))
        expected = x + sae.decode(acts, **own) - same
        expected = same if kind == "reconstruct" else expected
    assert found[:, 0].equal(x[:, 0])
    torch.testing.assert_close(found[:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-4)
    assert replace(x[:, :1]).equal(x[:, :1])


def test_a_continuation_is_greedy_with_hooks_at_every_step(model):
    ids = torch.randint(1, D_VOCAB, (1, 5))
    shift = torch.randn(D_MODEL)
    logits, found = continue_text(
        as_model(model), ids, {HOOK_NAMES[0]: lambda x: x + shift}, n_new=4
    )
    hooks = [(HOOK_NAMES[0], lambda x, hook: x + shift)]
    expected = ids
    with torch.no_grad():
        for _ in range(4):
            steered = model.run_with_hooks(expected, fwd_hooks=hooks)
            expected = torch.cat([expected, steered[:, -1:].argmax(-1)], dim=1)
        first = model.run_with_hooks(ids, fwd_hooks=hooks)[0]
    assert found.equal(expected[0])
    torch.testing.assert_close(logits, first)


@pytest.fixture
def explorer(model, tokenizer):
    text = Text(context_size=N_CTX, prepend_bos=False)
    prompts = torch.randint(1, D_VOCAB, (5, N_CTX))
    return Explorer(random_sae(), model, text, lambda i: f"<i>w{i} ", prompts)


@pytest.fixture
def client(explorer):
    app = make_app("the page", explorer, ["127.0.0.1"])
    return TestClient(app, base_url="http://127.0.0.1:7450")


def finished(client: TestClient, request: dict) -> dict:
    job = client.post("/jobs", json=request).json()
    while job["state"] == "running":
        time.sleep(0.01)
        job = client.get(f"/jobs/{job['id']}").json()
    return job


def test_activations_are_those_of_the_analysis(client, explorer, model):
    job = finished(client, {"kind": "activations", "text": TEXT})
    assert job["state"] == "done", job
    ids = explorer.token_ids(TEXT)
    expected = prompt_acts(explorer.sae, model, ids)
    found = job["result"]
    assert found["tokens"] == [f"<i>w{i} " for i in ids[0].tolist()]
    assert found["latents"] == expected.latents.tolist()
    assert found["acts"] == pytest.approx(expected.acts.tolist(), rel=1e-3)


def test_activations_of_a_prompt_around_a_position(
    client, explorer, model, monkeypatch
):
    monkeypatch.setattr(explorer_module, "MAX_TOKENS", 8)
    job = finished(client, {"kind": "prompt", "prompt": 3, "position": 9})
    found = job["result"]
    table = prompt_acts(explorer.sae, model, explorer.prompts[3:4]).to_dataframe()
    expected = table[table.position.between(3, 10)]
    assert found["first"] == 3
    assert found["tokens"] == [f"<i>w{i} " for i in explorer.prompts[3, 3:11].tolist()]
    assert [p + 3 for p in found["positions"]] == expected.position.tolist()
    assert found["latents"] == expected.latent.tolist()
    assert found["acts"] == pytest.approx(expected.act.tolist(), rel=1e-3)
    for outside in ({"prompt": 5, "position": 0}, {"prompt": 0, "position": N_CTX}):
        answer = client.post("/jobs", json={"kind": "prompt", **outside})
        assert answer.status_code == 400
        assert "must be in [0, 5)" in answer.json()["error"]


def test_numbers_of_a_continuation(client, explorer, model):
    request = {"kind": "continue", "text": TEXT, "edit": "add", "layers": [0, 1]}
    nothing = finished(client, {**request, "value": 0.0, "n_new": 3})["result"]
    assert nothing["clean"] == nothing["edited"]
    assert len(nothing["clean"]) == 3
    assert nothing["kl_div"] == pytest.approx(0, abs=1e-5)
    loss = model(explorer.token_ids(TEXT), return_type="loss").item()
    assert nothing["ce_loss_clean"] == pytest.approx(loss, rel=1e-5)
    changed = finished(client, {**request, "value": 20.0, "n_new": 3})["result"]
    assert changed["kl_div"] > 1e-3
    assert changed["ce_loss_edited"] != nothing["ce_loss_edited"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example:7450"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Host": "[::1"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:7450"}, 202),
        ({"Content-Type": "text/plain"}, 415),
        ({}, 202),
    ],
)
def test_other_sites_cannot_start_a_job(client, headers, status):
    body = json.dumps({"kind": "activations", "text": TEXT})
    headers = {"Content-Type": "application/json", **headers}
    answer = client.post("/jobs", content=body, headers=headers)
    assert answer.status_code == status
    assert not any("access-control" in name.lower() for name in answer.headers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": ""}, "at least 1 character"),
        ({"text": "w7 " * 4000}, "at most 10000 characters"),
        ({"text": "w7 " * 20}, "may have 16 tokens; it has 23"),
        ({"layers": [2]}, r"in \[0, 2\)"),
        ({"latent": 64}, r"in \[0, 64\)"),
        ({"n_new": 1000}, "less than or equal to 64"),
        ({"edit": "delete"}, "'add', 'set' or 'reconstruct'"),
        ({"value": 1e9}, "less than or equal to 1000000"),
    ],
)
def test_requests_that_do_not_fit_are_refused(client, change, message):
    request = {"kind": "continue", "text": TEXT, "edit": "add", "layers": [0]}
    answer = client.post("/jobs", json={**request, "n_new": 3, **change})
    assert answer.status_code == 400
    assert re.search(message, answer.json()["error"]), answer.json()


def test_a_long_body_is_refused(client):
    headers = {"Content-Type": "application/json"}
    answer = client.post("/jobs", content=b" " * 2**17, headers=headers)
    assert answer.status_code == 413


def test_one_job_at_a_time_which_can_be_cancelled(client, explorer):
    go_on = threading.Event()

    def work(request, progress):
        go_on.wait(10)
        progress(1, 2)

    explorer.run = work
    request = {"kind": "activations", "text": TEXT}
    job = client.post("/jobs", json=request).json()
    assert client.post("/jobs", json=request).status_code == 409
    client.delete(f"/jobs/{job['id']}")
    go_on.set()
    while job["state"] == "running":
        job = client.get(f"/jobs/{job['id']}").json()
    assert job["state"] == "cancelled"
    assert client.get("/jobs/99").status_code == 404

    def fail(request, progress):
        raise RuntimeError("broken")

    explorer.run = fail
    failed = finished(client, request)
    assert (failed["state"], failed["error"]) == ("failed", "RuntimeError: broken")


@contextmanager
def running(app):
    """Serve an application on a free port of the loopback, in a thread."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(10)


def test_a_reader_types_a_text_and_steers(model, tmp_path):
    text = Text(context_size=N_CTX, prepend_bos=False)
    tokens = torch.randint(1, D_VOCAB, (5, N_CTX))
    explorer = Explorer(lens_sae(), model, text, lambda i: f"<i>w{i} ", tokens)
    suite = Suite(explorer.sae, model, tokens, n_examples=2)
    results: Any = suite.run([name for name in suite.available() if name in USED])
    content = ReportContent("T", {}, [], None, results, explorer.text_of, n_latents=9)
    acts = prompt_acts(explorer.sae, model, explorer.token_ids(TEXT))
    script = f"""
        const done = async () => {{
            while (document.getElementById("cancel").disabled === false
                || !/^(done|[A-Z])/.test(document.getElementById("job").textContent))
                await new Promise((f) => setTimeout(f, 20));
            document.getElementById("job").textContent;
        }};
        const set = (id, value) => {{ document.getElementById(id).value = value; }};
        set("text", "{TEXT}");
        document.getElementById("show-acts").click();
        await done();
        const seen = {{}};
        const rows = document.querySelector("#latent-outputs select");
        seen.rows = Array.from(rows.options, (option) => option.textContent);
        rows.value = "2"; rows.dispatchEvent(new Event("change"));
        seen.output = document.querySelector("#latent-outputs .token").textContent;
        seen.tokens = Array.from(document.querySelectorAll("#grid .token"),
            (one) => one.textContent);
        document.querySelector('#grid td[data-token="3"][data-layer="1"]').click();
        const button = document.querySelector("#cell .latents button");
        seen.latent = Number(button.dataset.latent);
        seen.label = button.textContent;
        button.click();
        seen.probs = Array.from(document.getElementById("token-layers").data[0].y);
        seen.chosen = Number(document.getElementById("edit-latent").value);
        set("edit-value", "20"); set("edit-n", "3");
        set("edit-first", "0"); set("edit-last", "1");
        document.getElementById("job").textContent = "";
        document.querySelector("#edit-form button").click();
        await done();
        const both = Array.from(document.querySelectorAll(".continuation"));
        seen.lengths = both.map((one) => one.querySelectorAll(".new").length);
        seen.numbers = both.map((one) => one.querySelector("small").textContent);
        set("edit-latent", "-1");
        document.querySelector(".example button").click();
        while (Number(byId("edit-latent").value) !== shown)
            await new Promise((f) => setTimeout(f, 20));
        const chosen = document.querySelector("#grid .chosen");
        seen.prompt = Array.from(document.querySelectorAll("#grid tbody .token"),
            (one) => one.textContent.trim());
        seen.act = Number(chosen.title);
        seen.of = shown;
        seen.markup = document.querySelectorAll("main i:not(.strip i)").length;
        seen.wide = document.documentElement.scrollWidth;
        return seen;
    """
    posted: Queue[bytes] = Queue()
    app = make_app(
        driven_page(report_html(content, served=True), script), explorer, ["127.0.0.1"]
    )

    async def seen_by_browser(request):
        posted.put(await request.body())
        return Response(status_code=204)

    app.add_route("/seen", seen_by_browser, methods=["POST"])
    with running(app) as address:
        seen = result_of_browser(address, posted, tmp_path, width=500)

    first = int(results["layer_distributions"].most_active(1))
    output = results["output_tokens"].top_ids[2, first, 0]
    assert seen["rows"][0] == "through the lens"
    assert seen["rows"][2] == "layer 1, without the lens"
    assert seen["output"] == explorer.text_of(int(output))
    assert [text.strip() for text in seen["tokens"]] == [
        f"<i>{word}" for word in TEXT.split()
    ]
    at_cell = acts.to_dataframe().query("position == 3 and layer == 1")
    best = at_cell.loc[at_cell.act.idxmax()]
    assert seen["latent"] == seen["chosen"] == best.latent
    assert seen["label"] == f"{int(best.latent)}: {best.act:.4g}"
    probs = acts.of_latent(int(best.latent))[:, 3]
    assert seen["probs"] == pytest.approx((probs / probs.sum()).tolist(), rel=1e-3)
    assert seen["lengths"] == [3, 3]
    loss = model(explorer.token_ids(TEXT), return_type="loss").item()
    assert f"{loss:.4g} nats" in seen["numbers"][0]
    assert "KL divergence" in seen["numbers"][1]
    examples = results["max_activating_examples"].of(seen["of"])
    row = int(examples.acts.argmax())
    ids = tokens[examples.prompts[row]].tolist()
    assert seen["prompt"] == [f"<i>w{i}" for i in ids]
    assert seen["act"] == pytest.approx(float(examples.acts[row]), rel=1e-3)
    assert seen["markup"] == 0
    assert seen["wide"] <= 500


def test_the_command_serves_on_the_loopback_alone(offline, capsys, monkeypatch):
    apps = []
    monkeypatch.setattr(
        uvicorn.Server, "run", lambda self, sockets: apps.append(self.config.app)
    )
    cli.main(["serve", "sae", *offline, "--port", "0", "--n_latents", "3"])
    assert "Serving http://127.0.0.1:" in capsys.readouterr().out
    own, other = (
        TestClient(apps[0], base_url=f"http://{host}").get("/")
        for host in ("localhost:7450", "evil.example")
    )
    assert (own.status_code, other.status_code) == (200, 403)
    assert 'id="latents-0"' in own.text
    with pytest.raises(SystemExit, match="must be an address of the loopback"):
        cli.main(["serve", "sae", *offline, "--host", "0.0.0.0"])
    with pytest.raises(SystemExit, match=r"--port must be in \[0, 65535\]; got 65536"):
        cli.main(["serve", "sae", *offline, "--port", "65536"])
    remote = ["--host", "127.0.0.2", "--remote_hosts", "box.example"]
    cli.main(["serve", "sae", *offline, "--port", "0", *remote])
    client = TestClient(apps[1], base_url="http://box.example")
    assert client.get("/").status_code == 200
