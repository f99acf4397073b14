"""A small endpoint that marks texts as a judge of the examples would."""

import json
from collections import deque
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "key-that-nobody-may-read"


class Judge(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint on a free port; `failures` are what its next replies are."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.failures, self.requests, self.keys = deque(), [], set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, body))
        self.server.keys.add(self.headers["Authorization"])
        failure = self.server.failures.popleft() if self.server.failures else None
        if failure == "close":
            self.close_connection = True
            return
        text = body["messages"][0]["content"].partition("<reply>")[2].partition("</reply>")[0]
        mark = f"{sum(map(ord, text)) % 11}" if failure != "words" else "It is good."
        reply = {"choices": [{"message": {"role": "assistant", "content": f" {mark}\n"}}]}
        status = failure if isinstance(failure, int) else 200
        data = json.dumps(reply if status == 200 else {"error": KEY}).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if status == 429:
            self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass
