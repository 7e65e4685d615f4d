"""Downloads against a server on the loopback that speaks the hub's file endpoints, with the faults of real networks."""

import errno
import hashlib
import io
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from scope_lens.releases import Release, from_path, load
from scope_lens.releases import index as release_index
from scope_lens.releases.hub import download, recorded_revision

REPO = "google/gemma-scope-2b-pt-res"
PATH = "layer_20/width_16k/average_l0_71"
OTHER = "layer_20/width_16k/average_l0_38"
FIRST, SECOND = "1" * 40, "2" * 40


def npz(seed: int, d_sae: int = 40) -> bytes:
    rng = np.random.default_rng(seed)
    stream = io.BytesIO()
    np.savez(
        stream,
        W_enc=rng.standard_normal((2304, d_sae), dtype=np.float32),
        W_dec=rng.standard_normal((d_sae, 2304), dtype=np.float32),
        b_enc=np.zeros(d_sae, np.float32),
        b_dec=np.zeros(2304, np.float32),
        threshold=np.ones(d_sae, np.float32),
    )
    return stream.getvalue()


class Hub(ThreadingHTTPServer):
    """The hub's file endpoints: HEAD and GET of /{repo}/resolve/{revision}/{path}, with commits, ETags and ranges.

    `commits` holds the files of each commit, `main` names the newest. `cuts` is how many of the next GETs are broken
    off, `after` how many bytes of a body such a GET sends. `status` replaces every answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.commits = {FIRST: {PATH: npz(1), OTHER: npz(2)}, SECOND: {PATH: npz(3), OTHER: npz(4)}}
        self.main = FIRST
        self.cuts, self.after = 0, 100_000
        self.status: int | None = None
        self.requests: list[SimpleNamespace] = []

    @property
    def gets(self) -> list[SimpleNamespace]:
        return [request for request in self.requests if request.method == "GET"]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_GET(self) -> None:
        self._answer("GET")

    def _answer(self, method: str) -> None:
        repo, _, rest = self.path.strip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        self.server.requests.append(
            SimpleNamespace(method=method, revision=revision, file=file, range=self.headers.get("Range"))
        )
        commit = self.server.main if revision == "main" else revision
        if self.server.status is not None:
            return self._refuse(self.server.status, "")
        if repo != REPO:
            return self._refuse(401, "RepoNotFound")
        if commit not in self.server.commits:
            return self._refuse(404, "RevisionNotFound")
        body = self.server.commits[commit].get(file.removesuffix("/params.npz"))
        if body is None:
            return self._refuse(404, "EntryNotFound", commit)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if start else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if method == "HEAD":
            return None
        if self.server.cuts:
            self.server.cuts -= 1
            body = body[: start + self.server.after]
            self.close_connection = True
        self.wfile.write(body[start:])
        return None

    def _refuse(self, status: int, code: str, commit: str = FIRST) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Content-Length", "0")
        self.end_headers()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return folder


def _point_to(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(cache, monkeypatch) -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        _point_to(monkeypatch, f"http://127.0.0.1:{server.server_port}")
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def no_pause(monkeypatch) -> None:
    """huggingface_hub waits a second before it takes a broken download up."""
    monkeypatch.setattr("time.sleep", lambda _: None)


@pytest.fixture
def release() -> Release:
    return from_path(REPO, PATH)


def leftovers(cache: Path) -> list[Path]:
    """Files of the cache that hold bytes of a download but are no complete file."""
    blobs = [path for path in cache.rglob("blobs/*") if path.is_file()]
    return [path for path in blobs if hashlib.sha256(path.read_bytes()).hexdigest() != path.name]


def test_a_download_is_loaded_and_kept(hub, cache, release):
    sae = load(release)
    with np.load(io.BytesIO(hub.commits[FIRST][PATH])) as content:
        assert torch.equal(sae.W_enc, torch.from_numpy(content["W_enc"]))
    assert (sae.cfg.release, sae.cfg.path) == (REPO, PATH)
    assert leftovers(cache) == []
    asked = len(hub.requests)
    load(release)
    assert len(hub.requests) == asked  # at a fixed commit the cache answers alone


def test_the_commit_of_the_first_download_stays(hub, release):
    assert recorded_revision(REPO) is None
    first = download(release)
    assert recorded_revision(REPO) == FIRST
    hub.main = SECOND
    other = download(from_path(REPO, OTHER))
    assert other.read_bytes() == hub.commits[FIRST][OTHER]
    assert {request.revision for request in hub.gets} == {FIRST}  # even the first GET names the commit, not the branch
    assert download(release) == first


def test_a_revision_that_the_caller_names_is_followed_and_not_recorded(hub, release):
    assert download(release, revision=SECOND).read_bytes() == hub.commits[SECOND][PATH]
    assert recorded_revision(REPO) is None
    assert download(release, revision="main").read_bytes() == hub.commits[FIRST][PATH]
    hub.main = SECOND
    assert download(release, revision="main").read_bytes() == hub.commits[SECOND][PATH]
    assert recorded_revision(REPO) is None


def test_a_commit_that_the_package_pins_comes_before_the_recorded_one(hub, release, monkeypatch):
    download(release)
    pinned = {**release_index._index(), "revisions": {REPO: SECOND}}
    monkeypatch.setattr(release_index, "_index", lambda: pinned)
    assert download(release).read_bytes() == hub.commits[SECOND][PATH]
    assert recorded_revision(REPO) == FIRST


def test_a_dropped_connection_is_taken_up_where_it_broke(hub, release, no_pause, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)  # 10 MB; what came of a last, broken chunk is lost
    hub.cuts, hub.after = 2, 120_000
    assert download(release).read_bytes() == hub.commits[FIRST][PATH]
    ranges = [request.range for request in hub.gets]
    assert ranges[0] is None
    assert len(ranges) == 3
    positions = [int(text.removeprefix("bytes=").removesuffix("-")) for text in ranges[1:]]
    assert positions == [100_000, 200_000]


def test_a_download_that_stays_broken_leaves_nothing_and_can_be_repeated(hub, cache, release, no_pause):
    hub.cuts, hub.after = 100, 0
    with pytest.raises(ConnectionError, match=r"average_l0_71 broke off \(RemoteProtocolError.*call load again"):
        download(release)
    assert leftovers(cache) == []
    assert recorded_revision(REPO) is None
    hub.cuts = 0
    assert download(release).read_bytes() == hub.commits[FIRST][PATH]


def test_an_interrupted_download_leaves_nothing(hub, cache, release, monkeypatch):
    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    hub.cuts = 1
    monkeypatch.setattr("time.sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        download(release)
    assert leftovers(cache) == []
    monkeypatch.undo()


def test_a_damaged_file_on_the_hub_is_refused_by_name(hub, release):
    hub.commits[FIRST][PATH] = hub.commits[FIRST][PATH][:-5000]
    with pytest.raises(ValueError, match=r"average_l0_71/params.npz: expected an npz archive .* truncated or damaged"):
        load(release)


def test_a_file_or_revision_that_the_hub_lacks(hub, release):
    with pytest.raises(
        KeyError, match=r"no file .*average_l0_72/params.npz .*lists the L0s 22, 38, 71, 139, 294 there"
    ):
        load(from_path(REPO, "layer_20/width_16k/average_l0_72"))
    with pytest.raises(KeyError, match=r"no revision 'v9'.*Pass revision='main'"):
        load(release, revision="v9")
    with pytest.raises(KeyError, match=r"has no file .*has no 'res' dictionary of width 2097152"):
        load(from_path(REPO, "layer_20/width_2m/average_l0_9"))
    with pytest.raises(FileNotFoundError, match=r"no access to google/gemma-scope-2b-pt-mlp .*401.*HF_ENDPOINT"):
        load(from_path("google/gemma-scope-2b-pt-mlp", PATH))


def test_offline_mode_reads_the_cache_and_refuses_the_rest(hub, release, monkeypatch):
    download(release)
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download(release).read_bytes() == hub.commits[FIRST][PATH]
    with pytest.raises(FileNotFoundError, match=r"average_l0_38/params.npz .* offline mode is on .*pass local_dir="):
        load(from_path(REPO, OTHER))
    assert len(hub.requests) == asked


def test_without_a_network_the_cache_answers_and_the_rest_is_refused_at_once(hub, release, monkeypatch):
    download(release, revision="main")
    cached = hub.commits[FIRST][PATH]
    _point_to(monkeypatch, "http://127.0.0.1:9")
    refs = Path(constants.HF_HUB_CACHE) / "models--google--gemma-scope-2b-pt-res" / "refs"
    refs.mkdir(exist_ok=True)
    (refs / "main").write_text(FIRST)  # as any other program leaves it
    assert download(release).read_bytes() == cached
    with pytest.raises(FileNotFoundError, match=r"the hub cannot be reached \(.*Connect and load it once, or pass"):
        download(from_path(REPO, OTHER))


@pytest.mark.parametrize("status", [500, 503, 429])
def test_a_hub_that_is_down_counts_as_no_network(hub, release, status):
    hub.status = status
    with pytest.raises(FileNotFoundError, match=rf"the hub cannot be reached \(.*{status}"):
        download(release)


def test_a_full_disk_is_noticed_before_the_download(hub, cache, release, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_000))
    with pytest.raises(OSError, match=r"No room for .*average_l0_71: the file has 1 MB and .* has 0 MB free") as error:
        load(release)
    assert error.value.errno == errno.ENOSPC
    assert hub.gets == []
    assert not cache.exists()


def test_a_disk_that_fills_up_during_the_download_leaves_nothing(hub, cache, release, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(OSError, match=r"No room for .*Free some space, or point HF_HOME to a larger disk"):
        load(release)
    assert leftovers(cache) == []
    assert recorded_revision(REPO) is None


def test_a_cache_that_can_only_be_read_is_read(hub, release, monkeypatch):
    download(release, revision="main")

    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(self))

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert download(release).read_bytes() == hub.commits[FIRST][PATH]
    assert len(hub.gets) == 1


def test_the_environment_alone_points_a_new_process_to_a_mirror(hub, tmp_path):
    script = (
        "from scope_lens.releases import from_path; from scope_lens.releases.hub import download; import sys\n"
        f"print(download(from_path({REPO!r}, {PATH!r})).stat().st_size, 'torch' in sys.modules)"
    )
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(len(hub.commits[FIRST][PATH])), "False"]
    ref = tmp_path / "home" / "hub" / "models--google--gemma-scope-2b-pt-res" / "refs" / "scope-lens"
    assert ref.read_text() == FIRST
