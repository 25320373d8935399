"""Serves the report of an SAE, with the reader's own text, on this machine."""

from dataclasses import dataclass, field
from ipaddress import ip_address

from sae_lens_multilayer.cli.analyze import AnalysisOptions
from sae_lens_multilayer.cli.options import ModelOptions, SAEOptions, TextOptions
from sae_lens_multilayer.cli.report import inputs_and_content
from sae_lens_multilayer.pictures.latents import USED
from sae_lens_multilayer.pictures.page import report_html

EXAMPLES = """example:
  sae-lens-multilayer serve output --dataset_path held-out.jsonl"""


@dataclass
class ServedText(TextOptions):
    """The text; settings not given are taken from the SAE's metadata."""

    n_tokens: int = 8_192
    """Tokens of text, in whole prompts."""


@dataclass
class Options:
    """What the page shows, and its address."""

    sae: SAEOptions
    model: ModelOptions
    text: ServedText
    analysis: AnalysisOptions
    n_latents: int = 1000
    """Latents in the browser: the most active ones, and --latents."""
    analysis_path: str | None = None
    """Folder that `analyze` wrote for this SAE: its results are shown, with its options
    of text and analysis; missing results about latents are computed."""
    host: str = "127.0.0.1"
    """Address to listen on. Anyone who can reach it can run the model, so addresses
    other than this machine's loopback need --remote_hosts."""
    port: int = 7450
    """Port to listen on; 0: a free one."""
    remote_hosts: list[str] = field(default_factory=list)
    """Names or addresses under which other machines open the page."""


def run(options: Options) -> None:
    """Run the command."""
    hosts = allowed_hosts(options)
    if not 0 <= options.port < 2**16:
        raise ValueError(f"--port must be in [0, 65535]; got {options.port}.")
    try:
        import uvicorn

        from sae_lens_multilayer.serving.app import make_app
        from sae_lens_multilayer.serving.explorer import Explorer
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; `pip install 'sae-lens-multilayer[serve]'` installs it."
        ) from error
    inputs, content = inputs_and_content(options, USED)
    page = report_html(content, served=True)
    explorer = Explorer(
        inputs.sae, inputs.model, inputs.text, inputs.text_of, inputs.prompts.ids
    )
    app = make_app(page, explorer, hosts)
    server = uvicorn.Server(
        uvicorn.Config(app, options.host, options.port, log_level="warning")
    )
    sockets = [server.config.bind_socket()]
    port = sockets[0].getsockname()[1]
    print(f"Serving http://{_in_url(options.host)}:{port}/ (Ctrl-C ends)", flush=True)
    server.run(sockets)


def allowed_hosts(options: Options) -> list[str]:
    """Values of the header `Host` to accept; ValueError for an address not allowed."""
    if is_loopback(options.host):
        return [options.host, "localhost", "127.0.0.1", "::1", *options.remote_hosts]
    if not options.remote_hosts:
        raise ValueError(
            "--host must be an address of the loopback, such as 127.0.0.1; got "
            f"{options.host}. To let others run the model, give --remote_hosts, the "
            "names under which they open the page."
        )
    return ["localhost", "127.0.0.1", "::1", *options.remote_hosts]


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
