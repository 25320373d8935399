"""The report, in a real browser if one is installed."""

import base64
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import D_VOCAB, N_CTX, count_calls
from hostile import HOSTILE
from sae_lens.saes.sae import SAEMetadata
from saes import HOOK_NAMES, random_sae

from sae_lens_multilayer import cli, evaluate
from sae_lens_multilayer.analysis import (
    Suite,
    TransferMatrix,
    layer_distributions,
)
from sae_lens_multilayer.files import write_whole
from sae_lens_multilayer.pictures import latents as latents_module
from sae_lens_multilayer.pictures.page import ReportContent, report_html

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
NASTY = "</script><b>$&\n"


@pytest.fixture
def tokens():
    return torch.randint(1, D_VOCAB, (5, N_CTX))


@pytest.fixture
def content(model, tokens) -> ReportContent:
    sae = random_sae()
    results = Suite(sae, model, tokens, n_examples=2).run()
    fvu = torch.rand(2, 2).double()
    results["transfer_matrix"] = TransferMatrix(HOOK_NAMES, HOOK_NAMES, 9, fvu)
    return ReportContent(
        title="A <title>",
        facts={"SAE": "a & b"},
        notes=["Position 0 is left out."],
        evaluation=evaluate(sae, model, tokens).to_dataframe(),
        results=results,
        text_of=lambda i: f"w{i}{NASTY}",
        prompt=layer_distributions(sae, model, tokens[:1]),
        n_latents=5,
    )


@contextmanager
def served(page: str) -> Iterator[tuple[str, Queue[bytes]]]:
    """Serve a page on this machine; its address, and what is posted back."""
    posted: Queue[bytes] = Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = page.encode() if self.path == "/" else b""
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", "text/html")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            posted.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", posted
        finally:
            server.shutdown()


def in_browser(page: str, script: str, folder: Path, width: int = 1280) -> Any:
    """Open a page, run a script on it when it is drawn, and give what it returns."""
    with served(driven_page(page, script)) as (address, posted):
        return result_of_browser(address, posted, folder, width)


def driven_page(page: str, script: str) -> str:
    """A page that runs a script when it is drawn, and posts what it returns.

    The page sends that back itself, in its own time: what a browser prints when its
    virtual time is over may come before the first frame is drawn.
    """
    helpers = """<script>
        const problems = [];
        addEventListener("error", (e) => problems.push(e.message));
        addEventListener("unhandledrejection", (e) => problems.push(`${e.reason}`));
        const drawAll = async (figures) => {
            for (const div of figures) {
                div.scrollIntoView();
                while (!div.data) await new Promise((f) => setTimeout(f, 20));
            }
        };
    </script>"""
    run = (
        "<script>addEventListener('load', async () => { let value = null;"
        f"try {{ await ready; value = await (async () => {{ {script} }})(); }}"
        "catch (e) { problems.push(`${e}`); }"
        "fetch('seen', {method: 'POST', body: JSON.stringify({value, problems})});"
        "});</script>"
    )
    page = page.replace("<head>", "<head>" + helpers)
    return page.replace("</body>", run + "</body>")


def result_of_browser(
    address: str, posted: Queue[bytes], folder: Path, width: int = 1280
) -> Any:
    """Open a driven page in Chromium, and give what its script returned."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("there is no Chromium here")
    with open(folder / "browser.log", "w+b") as log:
        command = [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu"),
            f"--user-data-dir={folder / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            *(f"--window-size={width},900", address),
        ]
        process = subprocess.Popen(
            command, stdout=log, stderr=log, start_new_session=True
        )
        try:
            result = json.loads(posted.get(timeout=300))
        except Empty:
            pytest.fail((folder / "browser.log").read_text(errors="replace")[-2000:])
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert result["problems"] == []
    return result["value"]


def unpacked(page: str, name: str) -> Any:
    """The data of one compressed element of a page."""
    data = re.search(rf'id="{name}">(.*?)</script>', page)
    assert data
    return json.loads(gzip.decompress(base64.b64decode(data[1])))


def latents_of(page: str) -> list[dict]:
    names = re.findall(r'id="(latents-\d+)">', page)
    return [latent for name in names for latent in unpacked(page, name)]


def test_numbers_are_read_back_from_a_browser(content, tmp_path, monkeypatch):
    monkeypatch.setattr(latents_module, "PIECE", 2)
    dists = content.results["layer_distributions"]
    first, second, *_, last = dists.most_active(5).tolist()
    script = f"""
        const text = (id) => document.getElementById(id).textContent;
        const box = document.getElementById("query");
        const title = () => document.querySelector("#latent h3").textContent;
        const shows = async (id) => {{
            const name = `Latent ${{id}}`;
            while (title() !== name) await new Promise((f) => setTimeout(f, 5));
        }};
        const seen = {{listed: document.querySelectorAll("#list button").length}};
        seen.first = title();
        document.querySelectorAll("#list button")[1].click();
        await shows({second});
        seen.address = location.hash;
        seen.probs = Array.from(document.getElementById("latent-layers").data[0].y);
        seen.shares = Array.from(document.getElementById("latent-layers").data[1].y);
        seen.bins = document.getElementById("latent-acts").data[0].customdata.flat();
        const own = document.querySelector(".example .own");
        seen.own = own.textContent;
        seen.colour = getComputedStyle(own).backgroundColor;
        seen.context = document.querySelector(".example code").textContent;
        seen.strip = document.querySelector(".strip").ariaLabel;
        seen.quantiles = document.querySelectorAll(".quantile .example").length;
        seen.outputs = Array.from(document.querySelectorAll(".tokens .token"),
            (one) => one.textContent);
        seen.others = Array.from(document.querySelectorAll(".others > *"),
            (one) => one.textContent);
        document.dispatchEvent(new KeyboardEvent("keydown", {{key: "k"}}));
        await shows({first});
        location.hash = "#latent={last}";
        await shows({last});
        location.hash = "#latent=63000";
        seen.absent = await new Promise((done) => setTimeout(
            () => done(document.getElementById("latent").textContent), 50));
        box.value = "{first}"; box.dispatchEvent(new Event("input"));
        seen.number = document.querySelector("#list button").dataset.latent;
        box.value = "no such token"; box.dispatchEvent(new Event("input"));
        seen.none = text("found");
        const query = own.textContent.split("<")[0].toUpperCase();
        box.value = query; box.dispatchEvent(new Event("input"));
        seen.token = Array.from(document.querySelectorAll("#list button"),
            (b) => b.dataset.latent);
        const cell = document.querySelector(
            'tr[data-layer="1"] td[data-column="delta_ce"]');
        seen.delta_ce = cell.textContent;
        const figures = Array.from(document.querySelectorAll(".figure"));
        await drawAll(figures);
        seen.drawn = figures.filter((div) => div.querySelector("svg")).length;
        const map = figures.find((div) =>
            div.dataset.figure === "layer_distributions");
        seen.heat = Array.from(map.calcdata[0][0].z, (row) => Array.from(row));
        seen.bar = map.querySelector(".cbtitle") .textContent;
        seen.notes = document.querySelector(".notes").textContent;
        seen.wide = document.documentElement.scrollWidth;
        return seen;
    """

    seen = in_browser(report_html(content), script, tmp_path)

    assert seen["listed"] == 5
    assert seen["first"] == f"Latent {first}"
    assert seen["address"] == f"#latent={second}"
    assert seen["probs"] == pytest.approx(dists.probs[:, second].tolist(), rel=1e-3)
    counts = dists.counts[:, second]
    assert seen["shares"] == pytest.approx((counts / dists.n_tokens).tolist())
    assert sum(n or 0 for n in seen["bins"]) == counts.sum()
    examples = content.results["max_activating_examples"].of(second)
    best = examples.acts.argmax()
    own = int(examples.context_ids[best, examples.n_before])
    assert seen["own"] == content.text_of(own).replace("\n", "↵")
    assert seen["own"] in seen["context"]
    assert f"{examples.layers[best]}: {examples.acts[best]:.4g}" in seen["strip"]
    assert seen["colour"].startswith("rgba(255, 140, 0")
    n_samples = len(content.results["sampled_examples"].of(second).acts)
    assert seen["quantiles"] == min(10, n_samples)
    outputs = content.results["output_tokens"]
    assert len(seen["outputs"]) == 20
    top = content.text_of(int(outputs.top_ids[0, second, 0]))
    assert seen["outputs"][0] == top.replace("\n", "↵")
    similar = content.results["decoder_similarity"]
    nearest = int(similar.nearest[second]), similar.max_cos_sim[second]
    assert seen["others"][0] == f"{nearest[0]}: {nearest[1]:.3f}"
    assert "no latent 63000; the SAE has 64" in seen["absent"]
    assert seen["number"] == str(first)
    assert seen["none"] == "0 of 5 latents"
    assert str(second) in seen["token"]
    expected = content.evaluation["delta_ce"].iloc[1]
    assert seen["delta_ce"] == f"{expected:#.4g}"
    assert seen["drawn"] == report_html(content).count('class="figure"')
    heat = dists.probs[:, dists.active_latents()]
    assert torch.tensor(seen["heat"]).numpy() == pytest.approx(heat.float().numpy())
    assert seen["bar"] == "P(layer | latent)"
    assert "Position 0" in seen["notes"]
    assert seen["wide"] <= 1280


def test_nothing_is_cut_off_on_a_narrow_screen(content, tmp_path):
    script = """
        const figures = Array.from(document.querySelectorAll(".figure"));
        await drawAll(figures);
        const right = (one) => one.getBoundingClientRect().right;
        const drawn = document.querySelectorAll(".main-svg, .example, #list, h2");
        return {
            n: drawn.length,
            screen: innerWidth,
            page: document.querySelector("main").scrollWidth,
            farthest: Math.max(...Array.from(drawn, right)),
        };
    """
    # No window of Chromium is narrower than 500 pixels.
    page = report_html(content).replace("</style>", "body { width: 400px; }</style>", 1)
    seen = in_browser(page, script, tmp_path, width=500)

    assert seen["n"] > report_html(content).count('class="figure"')
    assert seen["screen"] == 500
    assert seen["page"] <= 400
    assert seen["farthest"] <= 400


def test_the_page_needs_nothing_from_outside(content):
    page = report_html(content)
    head = page.split("<script>")[0]
    assert "<h1>A &lt;title&gt;</h1>" in page
    assert "a &amp; b" in page
    assert not re.search(
        r'(src|href)="(?!#|data:)',
        re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL),
    )
    assert "@@" not in head
    assert len(latents_of(page)) == 5


def test_hostile_texts_are_shown_and_nothing_runs(content, tmp_path):
    n, everything, names = len(HOSTILE), " ".join(HOSTILE), HOSTILE[:-1]
    fvu = torch.rand(n - 1, n - 1).double()
    content.results["transfer_matrix"] = TransferMatrix(names, names, 9, fvu)
    content.title, content.notes = everything, HOSTILE
    content.facts = dict.fromkeys(HOSTILE, everything)
    content.text_of = lambda i: HOSTILE[i % n]
    content.evaluation.index = pd.Index(HOSTILE[: len(content.evaluation)])
    write_whole(tmp_path / "page.html", report_html(content))
    script = """
        await drawAll(document.querySelectorAll(".figure"));
        return {
            hacked: typeof hacked,
            handlers: document.querySelectorAll("[onerror], [onload]").length,
            text: document.body.textContent,
        };
    """
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    found = in_browser(page, script, tmp_path)
    assert found["hacked"] == "undefined"
    assert found["handlers"] == 0
    for text in names:
        # As a fact, as a note and on both axes of a picture.
        assert found["text"].replace("\n", "").count(text.replace("\n", "")) >= 4, text


def test_missing_analyses_are_left_out_of_the_page(content):
    content.results, content.prompt = {}, None
    page = report_html(content)
    assert latents_of(page) == []
    assert unpacked(page, "latent-head")["index"]["id"] == []
    assert 'class="figure"' not in page


def test_chosen_latents_can_always_be_looked_at(content):
    dists = content.results["layer_distributions"]
    last = dists.most_active(1000)[-1].item()
    content.more = [last]
    latents = latents_of(report_html(content))
    assert [latent["id"] for latent in latents][-1] == last
    assert len(latents) == 6


def test_the_command_leaves_out_a_long_first_position(offline, model, capsys):
    with torch.no_grad():
        model.W_pos[0] *= 1000
    cli.main(["report", "sae", *offline, "--output_path", "r.html"])

    page = Path("r.html").read_text()
    assert "Positions [0] of each prompt are excluded" in page
    assert "60 of 64" in page
    with pytest.raises(SystemExit, match="exists"):
        cli.main(["report", "sae", *offline, "--output_path", "r.html"])


def test_a_report_reads_what_was_analysed(offline, model, monkeypatch):
    for layer, name in enumerate(HOOK_NAMES):
        metadata = SAEMetadata(hook_names=[name], model_name="tiny")
        random_sae(metadata=metadata).save_model(f"layer_{layer}")
    analysed = [*offline, "--single_layers", "layer_1", "--exclude_positions", "0"]
    cli.main(["analyze", "sae", *analysed, "--latents", "5"])
    shutil.rmtree("analyses/redundancy")
    cli.main(["report", "sae", *analysed, "--latents", "5", "--output_path", "a.html"])
    calls = count_calls(monkeypatch, model, "run_with_cache")
    elsewhere = Path("elsewhere")
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)

    cli.main(["report", "../sae", "--analysis_path", "../analyses"])

    # The one prompt, and SAELens' own call to learn the width; no analysis again.
    assert [args[0].numel() for args, _ in calls] == [1, N_CTX]
    read, computed = Path("report.html").read_text(), Path("../a.html").read_text()
    assert pieces_of(read) == pieces_of(computed)
    assert "Beside single-layer SAEs" in read
    assert 'data-figure="transfer_matrix"' in read
    assert 'data-figure="single_layer_comparison" data-panel="2"' in read


def pieces_of(page: str) -> list[str]:
    """The tables and data of a page."""
    tables = re.findall(r"<tbody>.*?</tbody>", page, re.DOTALL)
    return tables + re.findall(r'(?:json|gzip)" id=.*?</script>', page, re.DOTALL)


def test_a_report_refuses_analyses_of_another_sae_or_text(offline):
    options = [*offline, "--analyses", "variances"]
    cli.main(["analyze", "sae", *options])
    report = ["report", "sae", "--analysis_path", "analyses"]
    with pytest.raises(SystemExit, match=r"--n_tokens was 64 for the analyses.*got 32"):
        cli.main([*report, "--n_tokens", "32"])
    with pytest.raises(
        SystemExit, match=r"sae must be a folder .*'analyses'.* no record\.json"
    ):
        cli.main(["report", "sae", "--analysis_path", "sae"])
    random_sae(d_sae=32).save_model("other")
    with pytest.raises(SystemExit, match=r"(?s)analyses was.*`SAE`: "):
        cli.main(["report", "other", "--analysis_path", "analyses"])
    text = pd.read_parquet("text.parquet")
    text[::-1].to_parquet("text.parquet")
    with pytest.raises(SystemExit, match=r"(?s)analyses was.*`text`: "):
        cli.main(report)
    assert not Path("report.html").exists()
