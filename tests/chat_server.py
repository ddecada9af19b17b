"""A local server for OpenAI's chat protocol, with faults on request."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """One answer of the server, sent after `delay` seconds.

    By default it is well-formed and has the text `text`.
    """

    text: Any = "A long description."
    status: int = 200
    body: str | None = None
    finish: str = "stop"
    delay: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class ChatServer:
    """A chat server.

    Attributes:
        url: the value of OPENAI_BASE_URL.
        requests: the bodies of the requests.
        keys: the API keys of the requests.
    """

    url: str
    reply: Callable[[dict[str, Any], int], Reply]
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    busy: int = 0
    most_busy: int = 0

    def idea(self, number: int) -> Any:
        """Return the user's text in a request."""
        return self.requests[number]["messages"][-1]["content"]


@contextmanager
def chat_server(
    reply: Callable[[dict[str, Any], int], Reply] = lambda request, number: Reply(),
) -> Iterator[ChatServer]:
    """Run a server within the block.

    Args:
        reply: returns the answer to a request and its number, from 0.
    """
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            with lock:
                number = len(server.requests)
                server.requests.append(request)
                server.keys.append(self.headers["Authorization"])
                server.busy += 1
                server.most_busy = max(server.busy, server.most_busy)
            answer = server.reply(request, number)
            time.sleep(answer.delay)
            with lock:
                server.busy -= 1
            self._send(answer)

        def _send(self, answer: Reply) -> None:
            message = {"role": "assistant", "content": answer.text}
            choice = {"index": 0, "message": message, "finish_reason": answer.finish}
            content = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            body = (json.dumps(content) if answer.body is None else answer.body).encode()
            try:
                self.send_response(answer.status)
                for key, value in {"Content-Type": "application/json", **answer.headers}.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):  # the client has given up waiting
                pass

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    server = ChatServer(f"http://127.0.0.1:{http.server_address[1]}/v1", reply)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
