"""The COCO caption list, built from a tiny archive on a local server."""

import hashlib
import http.server
import json
import re
import socket
import threading
import zipfile
from dataclasses import dataclass, field

import pytest

from layerbits.errors import UserError
from layerbits.inputs import coco
from layerbits.inputs.captions import load_captions
from layerbits.inputs.coco import MEMBER, build_coco_captions, main

IMAGES = 40


@dataclass
class Server:
    """Serves one file; the fields say how it misbehaves, ``requests`` what it was asked."""

    body: bytes
    url: str = ""
    ranges: bool = True
    send_length: bool = True
    stop_after: int | None = None
    status: int | None = None
    requests: list[str | None] = field(default_factory=list)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LAYERBITS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def archive(tmp_path):
    """An archive of the official layout: two captions an image, some odd."""
    annotations = []
    for image in range(IMAGES):
        annotations.append({"image_id": image, "id": 1000 + image, "caption": f"A later caption of image {image}."})
        annotations.append({"image_id": image, "id": image, "caption": f" Image  {image}\nshows a scene. "})
    annotations[3]["caption"] = annotations[1]["caption"].upper()  # images 0 and 1: the same but for case
    annotations[5]["caption"] = " \n"  # image 2: nothing
    path = tmp_path / "tiny.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr(MEMBER, json.dumps({"annotations": annotations}))
    return path


@pytest.fixture
def server(archive):
    state = Server(archive.read_bytes())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            state.requests.append(asked)
            if state.status:
                return self.send_error(state.status)
            start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and state.ranges else 0
            if start and start >= len(state.body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(state.body)}")
                return self.end_headers()
            body = state.body[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(state.body) - 1}/{len(state.body)}")
            if state.send_length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.stop_after])

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{httpd.server_port}/tiny.zip"
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,))
    thread.start()
    yield state
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def build(tmp_path, server, **options):
    return build_coco_captions(tmp_path / "out.txt", server.url, **{"sha256": None, "count": 10, **options})


def downloads(cache):
    return sorted((cache / "downloads").iterdir())


def test_one_clean_caption_an_image_the_first_annotated(tmp_path, server):
    lines = build(tmp_path, server, count=IMAGES - 2).path.read_text().splitlines()
    assert len(lines) == IMAGES - 2
    images = {int(re.fullmatch(r"image (\d+) shows a scene\.", line.lower())[1]) for line in lines}
    assert images in ({*range(IMAGES)} - {0, 2}, {*range(IMAGES)} - {1, 2})


def test_order_depends_on_the_seed_alone(tmp_path, server):
    first = build(tmp_path, server).path.read_text()
    assert build(tmp_path, server).path.read_text() == first
    assert build(tmp_path, server, seed=1).path.read_text() != first


def test_fewer_captions_are_a_prefix_of_more(tmp_path, server):
    more = build(tmp_path, server, count=20).path.read_text()
    assert more.startswith(build(tmp_path, server, count=10).path.read_text())


def test_archive_is_fetched_once(tmp_path, server):
    build(tmp_path, server)
    build(tmp_path, server, seed=1)
    assert len(server.requests) == 1


def test_built_list_loads_as_the_coco_dataset(cache, server):
    assert main(["--url", server.url, "--sha256", "none", "--count", "30"]) == 0
    assert len(load_captions("coco2017", "small").captions) == 16


def test_file_url_needs_no_server(tmp_path, archive):
    built = build_coco_captions(tmp_path / "out.txt", archive.as_uri(), sha256=None, count=5)
    assert built.captions == 5


def test_file_url_that_names_no_file(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        build_coco_captions(tmp_path / "out.txt", (tmp_path / "none.zip").as_uri())


# Interrupted downloads


def test_interrupted_download_says_how_far_it_came_and_leaves_no_result(tmp_path, server, cache):
    server.stop_after = 100
    with pytest.raises(UserError, match=rf"broke off at 100 of {len(server.body):,} bytes; run the same command"):
        build(tmp_path, server)
    assert not (tmp_path / "out.txt").exists()
    assert [p.suffix for p in downloads(cache)] == [".part"]


def test_interrupted_download_goes_on_where_it_stopped(tmp_path, server, cache):
    server.stop_after = 100
    with pytest.raises(UserError):
        build(tmp_path, server)
    with pytest.raises(UserError, match="broke off at 200 of"):
        build(tmp_path, server)
    server.stop_after = None
    built = build(tmp_path, server)
    assert server.requests == [None, "bytes=100-", "bytes=200-"]
    assert built.archive_sha256 == hashlib.sha256(server.body).hexdigest()
    assert [p.suffix for p in downloads(cache)] == [".zip"]


def test_server_without_ranges_starts_over(tmp_path, server):
    server.stop_after = 100
    with pytest.raises(UserError):
        build(tmp_path, server)
    server.stop_after, server.ranges = None, False
    assert build(tmp_path, server).archive_sha256 == hashlib.sha256(server.body).hexdigest()


def test_part_that_is_already_whole_is_taken(tmp_path, server, cache):
    server.send_length, server.stop_after = True, len(server.body) - 1
    with pytest.raises(UserError):
        build(tmp_path, server)
    (part,) = downloads(cache)
    part.write_bytes(server.body)
    assert build(tmp_path, server).captions == 10


def test_part_longer_than_the_file_is_thrown_away(tmp_path, server, cache):
    server.stop_after = 100
    with pytest.raises(UserError):
        build(tmp_path, server)
    (part,) = downloads(cache)
    part.write_bytes(b"x" * (len(server.body) + 5))
    server.stop_after = None
    assert build(tmp_path, server).archive_sha256 == hashlib.sha256(server.body).hexdigest()


def test_server_without_length_still_works(tmp_path, server):
    server.send_length = False
    assert build(tmp_path, server).captions == 10


# Wrong archives


def test_checksum_is_compared(tmp_path, server):
    digest = hashlib.sha256(server.body).hexdigest()
    assert build(tmp_path, server, sha256=digest.upper()).archive_sha256 == digest


def test_wrong_checksum_names_both_and_writes_nothing(tmp_path, server):
    with pytest.raises(UserError, match=rf"has sha256 {hashlib.sha256(server.body).hexdigest()}, expected {'0' * 64}"):
        build(tmp_path, server, sha256="0" * 64)
    assert not (tmp_path / "out.txt").exists()


def test_official_checksum_is_the_default(tmp_path, server):
    with pytest.raises(UserError, match=f"expected {coco.ARCHIVE_SHA256}"):
        build_coco_captions(tmp_path / "out.txt", server.url)


def test_not_an_archive(tmp_path, server):
    server.body = b"<html>welcome to the hotel network</html>"
    with pytest.raises(UserError, match="is not the COCO 2017 annotation archive"):
        build(tmp_path, server)


def test_archive_without_the_captions(tmp_path):
    path = tmp_path / "other.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr("annotations/instances_train2017.json", "{}")
    with pytest.raises(UserError, match=r"captions_train2017\.json"):
        build_coco_captions(tmp_path / "out.txt", path.as_uri(), sha256=None)


@pytest.mark.parametrize("content", ["[]", "{", '{"annotations": [{"id": 1}]}', '{"annotations": [3]}'])
def test_captions_of_another_shape(tmp_path, content):
    path = tmp_path / "other.zip"
    with zipfile.ZipFile(path, "w") as zipped:
        zipped.writestr(MEMBER, content)
    with pytest.raises(UserError, match="is not the COCO 2017 annotation archive"):
        build_coco_captions(tmp_path / "out.txt", path.as_uri(), sha256=None)


def test_too_few_captions_says_how_many(tmp_path, server):
    with pytest.raises(UserError, match=f"has {IMAGES - 2} distinct captions; use --count {IMAGES - 2} or fewer"):
        build(tmp_path, server, count=IMAGES)


# Bad surroundings


def test_offline_names_the_text_file_dataset(tmp_path):
    with socket.socket() as taken:  # bound but not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/a.zip"
        with pytest.raises(UserError, match=r"cannot reach .*dataset=text_file dataset\.path=FILE"):
            build_coco_captions(tmp_path / "out.txt", url)


def test_answer_that_is_no_file(tmp_path, server):
    server.status = 404
    with pytest.raises(UserError, match="answered 404"):
        build(tmp_path, server)


def test_url_that_is_none(tmp_path):
    with pytest.raises(UserError, match="cannot reach archive"):
        build_coco_captions(tmp_path / "out.txt", "archive")


def test_output_that_is_a_folder(tmp_path, server):
    with pytest.raises(UserError, match="is a folder"):
        build_coco_captions(tmp_path, server.url)
    assert not server.requests


def test_output_that_cannot_be_written(tmp_path, server):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        build_coco_captions(tmp_path / "file" / "out.txt", server.url, sha256=None, count=5)


def test_count_below_one(tmp_path, server):
    with pytest.raises(UserError, match="--count 0"):
        build(tmp_path, server, count=0)


def test_command_line_ends_with_one_line_and_status_2(tmp_path, server, capsys):
    assert main(["--out", str(tmp_path / "out.txt"), "--url", server.url]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_command_line_prints_the_checksum(tmp_path, server, capsys):
    assert main(["--out", str(tmp_path / "o.txt"), "--url", server.url, "--sha256", "none", "--count", "9"]) == 0
    assert capsys.readouterr().out == (
        f"9 captions in {tmp_path / 'o.txt'} (archive sha256 {hashlib.sha256(server.body).hexdigest()})\n"
    )
