"""As much of a W&B server as its client needs to start, fill, resume and finish a run."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class WandbServer(ThreadingHTTPServer):
    """Runs by id: what the client said of each (``fields``), its history lines in order, its last summary."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs = {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self):
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        """A client that hangs up is none."""

    def graphql(self, operation, variables):
        project = {"id": "p", "name": variables.get("project") or "p", "entity": {"id": "e", "name": "someone"}}
        if operation == "RunResumeStatus":
            run = self.runs.get(variables["name"])
            return {"model": {**project, "bucket": resumable(variables["name"], run) if run else None}}
        if operation == "UpsertBucket":
            run = self.runs.setdefault(variables["name"], {"fields": {}, "history": [], "summary": {}})
            run["fields"] |= {name: value for name, value in variables.items() if value is not None}
            bucket = {"id": "b", "name": variables["name"], "config": "{}", "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": not run["history"]}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/file"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}

    def stream(self, run_id, files):
        run = self.runs[run_id]
        for name, part in files.items():
            lines = [json.loads(line) for line in part["content"] if line]
            if name == "wandb-history.jsonl":
                run["history"][part["offset"] :] = lines
            elif name == "wandb-summary.json":
                run["summary"] = lines[-1]


def resumable(name, run):
    last = [json.dumps(line) for line in run["history"][-1:]]
    return {
        "id": "b",
        "name": name,
        "historyLineCount": len(run["history"]),
        "eventsLineCount": 0,
        "logLineCount": 0,
        "historyTail": json.dumps(last),
        "eventsTail": "[]",
        "summaryMetrics": json.dumps(run["summary"]),
        "config": run["fields"].get("config", "{}"),
        "wandbConfig": json.dumps({"t": 1}),  # without it the client takes the run for one that never started
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Quiet."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path == "/graphql":
            asked = json.loads(body)
            self.answer({"data": self.server.graphql(asked.get("operationName"), asked.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            self.server.stream(self.path.split("/")[-2], json.loads(body).get("files") or {})
            self.answer({})
        else:  # its telemetry
            self.answer({}, 404)

    def do_PUT(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.answer({})

    def answer(self, content, status=200):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
