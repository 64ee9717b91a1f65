"""Published checkpoints and the picture, from a hub of the tests' own, whose faults are named."""

import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from hub import COMMIT, Hub, digest
from PIL import Image
from safetensors.torch import load_file, save

from xai_helpers.checkpoints import BUNDLED, CHECKPOINTS, HUB_BOXES, HUB_PICTURE, chosen_weights, example_scene, load
from xai_helpers.hub import damaged, lacks
from xai_helpers.imagenet import efficientnet_lite
from xai_helpers.scenes import make_scene

ROOT = Path(__file__).resolve().parents[1]
RESNET, YOLOS, CLIP = (CHECKPOINTS[name].hub for name in ("resnet", "yolos", "clip-base"))
PICTURE = f"datasets/{HUB_PICTURE}"
TOKEN = "hf_thisisasecretofthereader"
WEIGHTS = "model.safetensors"

pytestmark = pytest.mark.timeout(120)  # seconds: a test that waits for an answer that never comes

#: Reads lines of JSON, runs what they say, and says what came of it: (None, the value) or (kind of error, its message).
READER = """
import json, sys
answers, sys.stdout = sys.stdout, sys.stderr
names = {}
exec("from xai_helpers import hub; from xai_helpers.checkpoints import *; import os, pathlib", names)
for line in sys.stdin:
    *before, last = json.loads(line)
    try:
        for statement in before:
            exec(statement, names)
        found = None, eval(last, names)
    except BaseException as error:
        found = type(error).__name__, str(error)
    print(json.dumps(found), file=answers, flush=True)
"""


class Reader:
    """A process that reads from a hub, with a cache of its own: huggingface_hub reads its settings when imported."""

    def __init__(self, folder, endpoint, **environment):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XAI_", "TQDM"))}
        self.home = folder / "home"
        settings = {"HF_HOME": self.home, "HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN, "PYTHONPATH": ROOT}
        settings |= {"XAI_DEVICE": "cpu", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", **environment}
        self.log = folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", READER],
                env=kept | {name: str(value) for name, value in settings.items()},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def begin(self, *code):
        self.process.stdin.write(json.dumps(code) + "\n")
        self.process.stdin.flush()

    def end(self):
        kind, found = json.loads(self.process.stdout.readline() or '["gone", ""]')
        assert TOKEN not in str(found)
        return kind, found

    def __call__(self, *code):
        self.begin(*code)
        return self.end()

    def close(self):
        self.process.stdin.close()
        assert self.process.wait(20) == 0


@pytest.fixture(scope="module")
def reading(tmp_path_factory):
    """The hub and a reader of it."""
    with Hub() as hub:
        reader = Reader(tmp_path_factory.mktemp("reader"), hub.address)
        assert reader("hub.build_hf_headers() and None") == (None, None)  # asks once how it is to name itself
        yield hub, reader
        reader.close()


@pytest.fixture
def hub(reading):
    hub = reading[0]
    hub.heal()
    hub.files = {RESNET: published("resnet")}
    return hub


@pytest.fixture
def read(reading, hub):
    """The reader, with an empty cache and limits as they are."""
    reader = reading[1]
    for name in ("hub", "datasets"):
        shutil.rmtree(reader.home / name, ignore_errors=True)
    assert reader("hub.ANSWER, hub.TRY, hub.SILENCE = 15, 4, 30", "1")[0] is None
    return reader


def published(name):
    return {path.name: path.read_bytes() for path in (BUNDLED / name).iterdir()}


def in_cache(reader, repository=RESNET):
    """The files that the cache has, as far as they hold something."""
    root = reader.home / "hub" / f"models--{repository.replace('/', '--')}"
    return sorted(path.name for path in (root / "blobs").iterdir()) if root.is_dir() else []


LOAD, FIRST = "load('resnet', 'hub')[0].config.id2label[0]", "astronaut"


def test_a_published_checkpoint_is_what_was_published(hub, read):
    state = "{k: v.double().sum().item() for k, v in load('resnet', 'hub')[0].state_dict().items()}"
    kind, sums = read(state)
    assert kind is None
    for key, value in load("resnet", "bundled")[0].state_dict().items():
        assert sums[key] == value.double().sum().item()
    # Nobody else is asked: no service that converts weights, no count, no list of models.
    assert {path for path in hub.asked if not path.split()[1].startswith(f"/{RESNET}/resolve/")} == set()
    assert sum(path.startswith("GET") for path in hub.asked) == 3


def test_what_the_cache_has_needs_no_network(hub, read):
    assert read(LOAD) == (None, FIRST)
    hub.asked.clear()
    del hub.files[RESNET]  # the repository is gone
    assert read(LOAD) == (None, FIRST) and hub.asked == []


def test_what_the_libraries_themselves_have_cached_is_taken(hub, read):
    hub.files[PICTURE] = {"README.md": CARD, "cats.png": picture()}
    filled = read(
        "import datasets, transformers",
        f"datasets.load_dataset('{HUB_PICTURE}', split='test')",
        f"transformers.AutoImageProcessor.from_pretrained('{RESNET}')",
        f"transformers.ResNetForImageClassification.from_pretrained('{RESNET}').training",
    )
    assert filled == (None, False)
    hub.silent = True
    hub.asked.clear()
    assert read(LOAD) == (None, FIRST) and read(SCENE) == (None, [640, 480, 10, 200, 48]) and not hub.asked


def test_a_checkpoint_with_texts_and_one_in_several_files(hub, read):
    for name in ("clip-base", "clip-large"):
        repository = CHECKPOINTS[name].hub
        hub.files[repository] = published(name)
        call = f"[len(load({name!r}, 'hub')[1].tokenizer), load({name!r}, 'hub')[0].num_parameters()]"
        model, processor = load(name, "bundled")
        assert read(call) == (None, [len(processor.tokenizer), model.num_parameters()])
        hub.asked.clear()
        assert read(call)[0] is None and not hub.asked


def test_a_checkpoint_in_timms_format(hub, read):
    """No processor's file, no kind of model, and names of its own."""
    model, _ = efficientnet_lite()
    pretrained = timm.get_pretrained_cfg("tf_efficientnet_lite0.in1k").to_dict()
    config = {"architecture": "tf_efficientnet_lite0", "num_classes": 1000, "pretrained_cfg": pretrained}
    weights = save({key: value.contiguous() for key, value in model.timm_model.state_dict().items()})
    repository = CHECKPOINTS["efficientnet-lite"].hub
    hub.files[repository] = {"config.json": json.dumps(config).encode(), WEIGHTS: weights}
    scores = "(lambda m, p: m(**p(make_scene(0).image)).logits[0, :9].tolist())(*load('efficientnet-lite', 'hub'))"
    kind, found = read(scores)
    assert kind is None
    _, processor = load("efficientnet-lite", "bundled")
    with torch.no_grad():
        wanted = model(**processor(make_scene(0).image)).logits[0, :9]
    torch.testing.assert_close(torch.tensor(found), wanted, rtol=1e-3, atol=1e-3)
    hub.asked.clear()
    assert read(scores) == (None, found) and not hub.asked


REFUSALS = {
    "missing": ((404, "RepoNotFound"), "127.0.0.1 has no such repository, or it is private. Check the name"),
    "gated": ((403, "GatedRepo"), "it is gated. Ask for access on its page at 127.0.0.1, then log in: hf auth login"),
    "token": ((401, ""), "127.0.0.1 does not accept this machine's token. Unset HF_TOKEN, or log in"),
    "too many": ((429, ""), r"127.0.0.1 has had too many questions \(429\). Wait 7 s"),
    "error": ((500, ""), r"127.0.0.1 is out of order \(500\). Try again later"),
    "overload": ((503, ""), r"127.0.0.1 is out of order \(503\). Try again later"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_is_named(hub, read, case):
    (hub.status, hub.code), wanted = REFUSALS[case]
    pattern = f"The checkpoint {RESNET} is not on this machine and could not be fetched: {wanted}"
    kind, message = read(LOAD)
    assert kind == "OSError" and re.match(pattern, message)
    assert message.endswith('or use what is bundled: load(\'resnet\', weights="bundled"), or leave XAI_WEIGHTS unset.')
    assert len(hub.asked) == (2 if hub.status in (429, 500, 503) else 1)  # those that may pass are asked again
    kind, message = read("example_scene('hub')")
    pattern = f"The picture {HUB_PICTURE} is not on this machine and could not be fetched: {wanted}"
    assert kind == "OSError" and re.match(pattern, message)
    assert message.endswith('or use what is bundled: example_scene("bundled"), or leave XAI_WEIGHTS unset.')
    assert not in_cache(read)


@pytest.mark.parametrize("call", [LOAD, "example_scene('hub')"])
def test_a_silent_host_is_not_waited_for(hub, read, call):
    hub.silent = True
    kind, message = read("hub.ANSWER, hub.TRY = 1, 30", call)  # the library's own limit does not count
    assert kind == "OSError" and "could not be fetched: 127.0.0.1 did not answer for 1 s. Check the network" in message
    kind, message = read("hub.ANSWER, hub.TRY = 30, .2", call)
    assert kind == "OSError" and "could not be fetched: 127.0.0.1 did not answer (read timeout" in message
    assert len(hub.asked) == 3  # one, and one with a retry


def test_a_host_that_refuses_is_named(hub, read):
    hub.close()
    kind, message = read(LOAD)
    hub.open()
    assert kind == "OSError" and "127.0.0.1 cannot be reached (connect error" in message
    assert read(LOAD) == (None, FIRST)


def test_a_page_that_is_not_the_hubs_is_named(hub, read):
    hub.page = b"<html>Welcome to our hotel! Log in.</html>"
    for call in (LOAD, "example_scene('hub')"):
        kind, message = read(call)
        assert kind == "OSError" and "what answers as 127.0.0.1 is not the hub. Log in to the network" in message


def test_a_missing_file_is_named(hub, read):
    for name, wanted in {
        "config.json": "could not be fetched: 127.0.0.1 has no config.json of it",
        "preprocessor_config.json": "127.0.0.1 has no processor_config.json or preprocessor_config.json of it",
        WEIGHTS: f"127.0.0.1 has no weights that are read here, {WEIGHTS} or pytorch_model.bin of it",
    }.items():
        shutil.rmtree(read.home / "hub", ignore_errors=True)
        hub.files[RESNET] = published("resnet")
        del hub.files[RESNET][name]
        kind, message = read(LOAD)
        assert kind == "OSError" and wanted in message
    hub.files[RESNET] = published("resnet")
    assert read(LOAD) == (None, FIRST)


def test_other_bytes_than_announced_are_not_kept(hub, read):
    right = hub.files[RESNET][WEIGHTS]
    hub.sent[WEIGHTS] = right[:100_000] + bytes(4096) + right[104_096:]
    assert len(hub.sent[WEIGHTS]) == len(right) and hub.sent[WEIGHTS] != right
    kind, message = read(LOAD)
    assert kind == "OSError" and f"other bytes came than its hash {digest(WEIGHTS, right)[:8]}... says" in message
    assert len(in_cache(read)) == 2  # config and processor
    hub.heal()
    assert read(LOAD) == (None, FIRST)


def test_a_file_that_breaks_off_is_resumed(hub, read):
    size = len(hub.files[RESNET][WEIGHTS])
    hub.cut[WEIGHTS] = size // 2 + 1
    assert read(LOAD) == (None, FIRST)
    assert sum(path.startswith("GET") and WEIGHTS in path for path in hub.asked) == 2


def test_a_file_that_is_too_short_is_named(hub, read):
    hub.sent[WEIGHTS] = hub.files[RESNET][WEIGHTS][:300_000]
    kind, message = read(LOAD)
    size = len(hub.files[RESNET][WEIGHTS])
    assert kind == "OSError" and f"the file ends after 300,000 of {size:,} bytes. Nothing of it was kept" in message
    assert len(in_cache(read)) == 2


def test_a_file_that_stops_coming_is_given_up_and_shown_before(hub, read):
    hub.stuck[WEIGHTS] = 100_000
    kind, message = read("hub.SILENCE = 3", LOAD)
    assert kind == "OSError" and "could not be fetched: 127.0.0.1 sent no byte for 3 s" in message
    assert len(in_cache(read)) == 2
    small = len(hub.files[RESNET]["config.json"]) + len(hub.files[RESNET]["preprocessor_config.json"])
    shown = f"{(100_000 + small) / 1e3:.0f}k/{(len(hub.files[RESNET][WEIGHTS]) + small) / 1e6:.2f}M"
    assert re.search(rf"The checkpoint {RESNET}: .*{shown}", read.log.read_text())


def test_an_interrupt_ends_it(hub, read):
    hub.stuck[WEIGHTS] = 100_000
    read.begin(LOAD)
    while not any(path.startswith("GET") and WEIGHTS in path for path in hub.asked):
        time.sleep(0.05)
    read.process.send_signal(signal.SIGINT)
    assert read.end() == ("KeyboardInterrupt", "")
    assert len(in_cache(read)) == 2  # and nothing that is half there
    hub.heal()
    assert read(LOAD) == (None, FIRST)


def test_a_broken_file_in_the_cache_is_named_and_deleted_it_comes_anew(hub, read):
    assert read(LOAD) == (None, FIRST)
    for name, broken in {
        "config.json": b'{"model_type": "resnet", ',
        "preprocessor_config.json": b"",
        WEIGHTS: b"\xff" * 64,
    }.items():
        right = hub.files[RESNET][name]
        held = read.home / "hub" / f"models--{RESNET.replace('/', '--')}" / "blobs" / digest(name, right)
        for wrong in (broken, right[: len(right) // 2]):
            held.write_bytes(wrong)
            for _ in range(2):  # it stays so
                kind, message = read(LOAD)
                first = rf"The file {read.home}/hub/\S+/{COMMIT}/{name} cannot be read .+Delete {held}, and it is"
                assert kind == "OSError" and re.match(first, message, flags=re.DOTALL)
            held.unlink()
            assert read(LOAD) == (None, FIRST)


def test_a_byte_that_is_wrong_in_the_cache_is_found(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for name, body in published("resnet").items():
        (tmp_path / "blobs" / digest(name, body)).write_bytes(body)
        (tmp_path / "snapshot" / name).symlink_to(Path("..", "blobs", digest(name, body)))
    assert damaged(tmp_path / "snapshot") == lacks(tmp_path / "snapshot") == ""
    path = (tmp_path / "snapshot" / WEIGHTS).resolve()
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert f"{WEIGHTS} is not the one that was published" in damaged(tmp_path / "snapshot")


def test_random_parts_are_refused(hub, read):
    weights = load_file(BUNDLED / "resnet" / WEIGHTS)
    for part in ("classifier", "resnet.encoder.stages.2"):
        shutil.rmtree(read.home / "hub", ignore_errors=True)
        kept = {key: value for key, value in weights.items() if not key.startswith(part)}
        hub.files[RESNET][WEIGHTS] = save(kept, {"format": "pt"})
        wanted = f"weights in {RESNET} are not those of a ResNetForImageClassification: .* such as {part}"
        for call in (LOAD, f"load('resnet', '{RESNET}')"):
            kind, message = read(call)
            assert kind == "ValueError" and re.search(wanted, message)


def test_another_kind_or_size_is_named(hub, read):
    hub.files |= {"me/segmenter": published("yolos"), "me/clip": published("resnet")}
    kind, message = read("load('resnet', 'me/segmenter')")
    assert kind == "ValueError" and "me/segmenter cannot be read as AutoModelForImageClassification" in message
    kind, message = read("load('clip-base', 'me/clip')")
    assert kind == "OSError" and "127.0.0.1 has no tokenizer.json of it" in message
    config = json.loads(hub.files[RESNET]["config.json"])
    del config["id2label"], config["label2id"]
    hub.files[RESNET]["config.json"] = json.dumps(config).encode()
    kind, message = read(LOAD)
    assert kind == "ValueError" and re.search(
        r"other sizes than its config.json says: classifier.1.bias is \(8,\), and not \(2,\)\. .*id2label", message
    )


def test_code_of_a_checkpoint_is_not_run(hub, read, tmp_path):
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\n"
    places = {"AutoConfig": "mine.Config", "AutoModelForImageClassification": "mine.Model"}
    config = json.dumps({"model_type": "mine", "auto_map": places})
    hub.files["me/mine"] = published("resnet") | {"config.json": config.encode(), "mine.py": code.encode()}
    kind, message = read("load('resnet', 'me/mine')")
    assert kind == "ValueError" and "me/mine has code of its own, which is not run here" in message and not ran.exists()


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_weights_in_pytorchs_format_are_read_and_a_pickle_is_not_run(hub, read, tmp_path):
    del hub.files[RESNET][WEIGHTS]
    held = io.BytesIO()
    torch.save(load_file(BUNDLED / "resnet" / WEIGHTS), held)
    hub.files[RESNET]["pytorch_model.bin"] = held.getvalue()
    assert read(LOAD) == (None, FIRST)
    hub.files["me/trap"] = published("resnet")
    del hub.files["me/trap"][WEIGHTS]
    hub.files["me/trap"]["pytorch_model.bin"] = pickle.dumps(Trap(str(tmp_path / "ran")))
    kind, message = read("load('resnet', 'me/trap')")
    assert kind == "ValueError" and "me/trap cannot be read" in message and not (tmp_path / "ran").exists()


def picture():
    held = io.BytesIO()
    Image.new("RGB", (640, 480), (10, 200, 48)).save(held, "png")
    return held.getvalue()


CARD = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: test\n    path: cats.png\n---\n"
SCENE = "[s.image.size + s.image.getpixel((0, 0)) for s in [example_scene('hub')]][0]"


def test_the_picture_is_fetched_once(hub, read):
    hub.files[PICTURE] = {"README.md": CARD, "cats.png": picture()}
    assert read(SCENE) == (None, [640, 480, 10, 200, 48])
    hub.asked.clear()
    del hub.files[PICTURE]
    assert read(SCENE) == (None, [640, 480, 10, 200, 48]) and hub.asked == []
    assert read("example_scene('hub').categories") == (None, list(HUB_BOXES))


def test_a_picture_that_is_cut_off_is_named(hub, read):
    for wrong in ({"cats.png": picture()[:300]}, {"cats.png": b"no picture"}, {"README.md": b""}):
        shutil.rmtree(read.home / "hub", ignore_errors=True)
        hub.files[PICTURE] = {"README.md": CARD, "cats.png": picture()} | wrong
        kind, message = read(SCENE)
        folder = f"{read.home}/hub/datasets--{HUB_PICTURE.replace('/', '--')}"
        assert kind == "OSError" and re.match(f"The picture {HUB_PICTURE} cannot be read: .+ Delete {folder},", message)
    hub.files[PICTURE] = {"README.md": CARD}
    shutil.rmtree(read.home / "hub", ignore_errors=True)
    kind, message = read(SCENE)
    assert kind == "OSError" and "could not be fetched: it has no picture: README.md" in message


def test_a_file_that_lies_elsewhere_is_fetched_by_the_same_rules(hub, read, tmp_path):
    body = hub.files[RESNET][WEIGHTS]
    call = f"hub.weights_file('{hub.address}/{RESNET}/resolve/main/{WEIGHTS}', pathlib.Path('{tmp_path}/there/w.pth'), "
    kind, message = read(f"{call}'01234567')")
    assert kind == "OSError" and "other bytes came than its hash 01234567... says" in message
    assert list((tmp_path / "there").iterdir()) == []
    assert read(f"{call}'{digest(WEIGHTS, body)[:8]}')") == (None, None)
    assert (tmp_path / "there" / "w.pth").read_bytes() == body
    hub.silent = True
    assert read(f"{call}'{digest(WEIGHTS, body)[:8]}')") == (None, None)


def test_weights_of_torchvision_that_are_broken_are_named(read, tmp_path):
    path = tmp_path / "hub" / "checkpoints" / "fasterrcnn_resnet50_fpn_coco-258fb6c6.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half a file")
    kind, message = read(f"os.environ.update(TORCH_HOME='{tmp_path}')", "load('faster-rcnn', 'hub')")
    assert kind == "OSError" and re.match(f"The file {path} cannot be read .* Delete it, and it is fetched", message)


def one(endpoint, folder, code, before=lambda: None, **environment):
    """What a process says that imports no more than it needs."""
    settings = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder), "HF_HUB_OFFLINE": "0"} | environment
    settings |= {"PYTHONPATH": str(ROOT), "HF_TOKEN": TOKEN}
    code = f"from xai_helpers import hub\ntry:\n    {code}\nexcept OSError as error:\n    print(error)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=settings, capture_output=True, text=True, preexec_fn=before, check=True
    )
    assert TOKEN not in done.stdout + done.stderr
    return done.stdout.strip()


def test_an_address_that_is_none_is_named(tmp_path):
    found = one("huggingface.co", tmp_path, f"hub.checkpoint({RESNET!r})")
    assert "HF_ENDPOINT is no address: 'huggingface.co'. It begins with https://" in found
    found = one(f"https://me:{TOKEN}@hub.invalid", tmp_path, f"hub.checkpoint({RESNET!r})")
    assert "could not be fetched: hub.invalid cannot be reached" in found


def no_large_files():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_cache_that_takes_nothing_is_named(hub, tmp_path):
    (tmp_path / "file").touch()
    found = one(hub.address, tmp_path / "file", f"hub.checkpoint({RESNET!r})")
    assert f"could not be fetched: {tmp_path}/file/hub cannot be written (Not a directory). Allow it, or set" in found
    found = one(hub.address, tmp_path / "home", f"hub.checkpoint({RESNET!r})", no_large_files)
    assert f"there is no room in {tmp_path}/home/hub (File too large). Make room, or set HF_HOME" in found
    blobs = tmp_path / "home" / "hub" / f"models--{RESNET.replace('/', '--')}" / "blobs"
    assert sorted(path.name for path in blobs.iterdir()) == sorted(
        digest(name, hub.files[RESNET][name]) for name in ("config.json", "preprocessor_config.json")
    )


def test_a_folder_says_what_it_lacks(tmp_path):
    folder = shutil.copytree(BUNDLED / "resnet", tmp_path / "mine")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match=f"{folder} is no whole checkpoint: it has no processor_config.json or preproc"):
        load("resnet", folder)
    (folder / "config.json").write_text('{"model_type"')
    with pytest.raises(OSError, match=f"The file {folder}/config.json cannot be read .* Save the checkpoint anew"):
        load("resnet", folder)
    folder = shutil.copytree(BUNDLED / "faster-rcnn", tmp_path / "detector")
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).write_bytes(save({key: value for key, value in weights.items() if "box_head" not in key}))
    with pytest.raises(ValueError, match="cannot be read as a Faster R-CNN .*box_head"):
        load("faster-rcnn", folder)


def test_a_word_that_is_no_place_of_weights_is_refused(monkeypatch):
    monkeypatch.setenv("XAI_WEIGHTS", "Hub")
    for call in (chosen_weights, example_scene, lambda: load("resnet")):
        with pytest.raises(ValueError, match='XAI_WEIGHTS is "bundled", "hub", a folder, or an id .*, not \'Hub\''):
            call()
    with pytest.raises(ValueError, match='^weights is "bundled", "hub"'):
        load("resnet", "hubb")
