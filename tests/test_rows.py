"""Reading through faults. Authority: the same rows without a fault."""

import json
import logging
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from datasets import Dataset, IterableDataset
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import get_session, hf_raise_for_status

from sae_lens_multilayer.text import rows
from sae_lens_multilayer.text.rows import read_rows

N_ROWS = 12


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """The waits that were asked for; none is waited for."""
    waited: list[float] = []
    monkeypatch.setattr(rows.time, "sleep", waited.append)
    return waited


@pytest.fixture
def server(monkeypatch):
    """A server of row numbers; `answers` holds the status of its next answers."""
    # The hub's client asks nobody while it is offline, not even this machine.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    answers: deque[int] = deque()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = answers.popleft() if answers else 200
            if status == 0:
                return  # hang up without an answer
            body = json.dumps({"number": int(self.path[1:])}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format, *args) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    httpd.answers = answers  # type: ignore[attr-defined]
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def streamed(server) -> IterableDataset:
    """A dataset whose rows come from the server, with the hub's own errors."""

    def read(port):
        for number in range(N_ROWS):
            try:
                answer = get_session().get(f"http://127.0.0.1:{port}/{number}")
            except Exception as error:
                raise ConnectionError("Server Disconnected") from error
            hf_raise_for_status(answer)
            yield answer.json()

    return IterableDataset.from_generator(read, gen_kwargs={"port": server.server_port})


def numbers(dataset, start=0) -> list[int]:
    return [int(row["number"]) for row in read_rows(dataset, start)]


@pytest.mark.parametrize("start", [0, 1, 7, N_ROWS, N_ROWS + 3])
def test_rows_from_a_place_on(start):
    data = Dataset.from_dict({"number": list(range(N_ROWS))})
    shuffled = data.to_iterable_dataset(num_shards=3).shuffle(seed=1, buffer_size=4)
    order = numbers(shuffled)
    assert sorted(order) == list(range(N_ROWS)) != order
    assert numbers(data, start) == list(range(N_ROWS))[start:]
    assert numbers(shuffled, start) == order[start:]


def test_a_server_that_fails_for_a_while_is_asked_again(server, waits, caplog):
    dataset = streamed(server)
    found = []
    with caplog.at_level(logging.WARNING, "sae_lens_multilayer"):
        for row in read_rows(dataset, 0):
            found.append(row["number"])
            if row["number"] == 4:
                server.answers.extend([503, 500, 429, 0])
    assert found == list(range(N_ROWS))
    assert waits == [2.0, 4.0, 8.0, 16.0]
    assert "Row 5 of the dataset cannot be read now" in caplog.messages[0]
    assert "503" in caplog.messages[0]


def test_each_fault_is_waited_for_anew(server, waits):
    for row in read_rows(streamed(server), 0):
        if row["number"] in (4, 8):
            server.answers.extend([503, 503])
    assert waits == [2.0, 4.0, 2.0, 4.0]


def test_a_server_that_stays_away_is_an_error_that_names_the_row(server, waits):
    dataset = streamed(server)
    rows_read = read_rows(dataset, 3)
    assert next(rows_read)["number"] == 3
    server.answers.extend([503] * 100)
    with pytest.raises(RuntimeError, match=r"Row 4 of the dataset.*503") as info:
        next(rows_read)
    assert isinstance(info.value.__cause__, HfHubHTTPError)
    assert waits == list(rows.RETRY_SECONDS)


@pytest.mark.parametrize("status", [401, 404])
def test_an_answer_that_will_not_change_is_an_error_at_once(server, waits, status):
    server.answers.append(status)
    with pytest.raises(RuntimeError, match=f"Row 0 of the dataset.*{status}"):
        next(read_rows(streamed(server), 0))
    assert waits == []


def test_offline_no_answer_is_waited_for(waits):
    def read():
        yield {"number": 0}
        raise OfflineModeIsEnabled("offline mode is enabled")

    found = read_rows(IterableDataset.from_generator(read), 0)
    next(found)
    with pytest.raises(RuntimeError, match=r"Row 1 of the dataset.*offline mode"):
        next(found)
    assert waits == []


def test_a_row_that_cannot_be_decoded_is_an_error_that_names_it(waits):
    def read():
        yield {"number": 0}
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    found = read_rows(IterableDataset.from_generator(read), 0)
    next(found)
    with pytest.raises(RuntimeError, match=r"Row 1 of the dataset.*invalid start byte"):
        next(found)
    assert waits == []
