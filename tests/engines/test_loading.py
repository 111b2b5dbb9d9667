"""Finding and checking checkpoints: what is taken, what is refused and with which words."""

import json
import shutil
import socket
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny_checkpoints import make_pipeline, save_original_layout
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from img2img.errors import ConfigurationError
from worker.engines.diffusion import loading
from worker.engines.diffusion.loading import SD15, load_checkpoint
from worker.engines.diffusion.model import open_model, resolve_devices


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tiny_4_channel_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_4_channel_folder, tmp_path / "model"))


def refusal_of(source: object) -> str:
    with pytest.raises(ConfigurationError) as caught:
        load_checkpoint(str(source))
    return str(caught.value)


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


@pytest.mark.usefixtures("no_network")
def test_the_bundled_model_needs_no_network():
    model = open_model("emoji-sd", "cpu")

    assert (model.name, model.native_size, model.is_inpainting) == ("emoji-sd", (256, 256), False)


@pytest.mark.usefixtures("no_network")
def test_a_diffusers_folder(folder):
    model = open_model(str(folder), "cpu")

    assert (model.name, model.native_size) == ("model", (64, 64))


def test_a_folder_with_half_precision_files_only(folder):
    for path in folder.glob("*/*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))

    assert load_checkpoint(str(folder)).name == "model"


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("in_channels", [4, 9])
@pytest.mark.parametrize("config", ["tiny", "config"])
def test_a_single_file_with_its_configuration_beside_it(tmp_path, tiny_4_channel_folder, in_channels, config):
    """The folder's UNet has 4 input channels; the file says itself that it has 9."""
    pipeline = make_pipeline(in_channels)
    save_original_layout(pipeline, tmp_path / "tiny.safetensors")
    configuration = shutil.copytree(tiny_4_channel_folder, tmp_path / config)
    for weights in Path(configuration).glob("*/*.safetensors"):
        weights.unlink()

    checkpoint = load_checkpoint(str(tmp_path / "tiny.safetensors"))

    assert checkpoint.name == "tiny"
    assert checkpoint.unet.config.in_channels == in_channels
    for network in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(checkpoint, network), getattr(pipeline, network))


@pytest.mark.usefixtures("no_network")
def test_a_single_file_alone_has_the_packaged_shape(tmp_path, tiny_4_channel_folder, monkeypatch):
    """Stable Diffusion 1.5's, of which a test has no weights: a tiny shape stands in for it."""
    monkeypatch.setattr(loading, "SD15", tiny_4_channel_folder)
    save_original_layout(make_pipeline(), tmp_path / "tiny.safetensors")

    assert load_checkpoint(str(tmp_path / "tiny.safetensors")).name == "tiny"


def test_the_packaged_shape_is_stable_diffusion_1_5():
    """Parameters per network, as published; the meta device allocates none of them."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(SD15, subfolder="unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(SD15, subfolder="vae"))
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(SD15 / "text_encoder"))

    assert [sum(tensor.numel() for tensor in network.parameters()) for network in (unet, vae, text_encoder)] == [
        859_520_964,
        83_653_863,
        123_060_480,
    ]


def test_the_packaged_tokenizer_is_clips():
    """The ids that OpenAI's tokenizer gives for this sentence."""
    tokenizer = CLIPTokenizer.from_pretrained(SD15 / "tokenizer", local_files_only=True)

    ids = tokenizer("a photo of an astronaut riding a horse on mars").input_ids

    assert ids == [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407]
    assert tokenizer.model_max_length == 77


@pytest.mark.parametrize("name", ["model.ckpt", "model.bin", "model.pt"])
def test_a_pickled_file_is_refused_unopened(tmp_path, name):
    message = refusal_of(tmp_path / name)

    assert message.startswith(f"IMG2IMG_MODEL={tmp_path / name} has pickled weights ({name})")
    assert "convert them to safetensors" in message


def test_a_folder_of_pickles_is_refused(folder):
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")

    assert "has pickled weights (unet/diffusion_pytorch_model.bin)" in refusal_of(folder)


def test_pickles_beside_safetensors_are_left_alone(folder):
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"never read")

    assert load_checkpoint(str(folder)).name == "model"


def test_missing_weights_are_not_filled_with_random_numbers(folder):
    for network in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        path = folder / f"{network}.safetensors"
        tensors = load_file(path)
        lost = next(iter(tensors))
        save_file({key: value for key, value in tensors.items() if key != lost}, path, {"format": "pt"})

        assert "lacks weights in" in refusal_of(folder)

        save_file(tensors, path, {"format": "pt"})


def test_a_damaged_file_is_refused(folder):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])

    assert "cannot be loaded" in refusal_of(folder)


def test_a_digest_beside_the_file_must_match(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    sidecar = path.with_name(f"{path.name}.sha256")
    sidecar.write_text(f"{sha256(path.read_bytes()).hexdigest()}  {path.name}\n")
    load_checkpoint(str(folder))

    sidecar.write_text("0" * 64)

    assert "does not match diffusion_pytorch_model.safetensors.sha256" in refusal_of(folder)


def test_a_file_of_something_else_is_refused(tmp_path):
    save_file({"weight": torch.zeros(1)}, tmp_path / "lora.safetensors")

    assert "lacks model.diffusion_model.input_blocks.0.0.weight" in refusal_of(tmp_path / "lora.safetensors")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("nowhere", "does not exist"),
        ("/nowhere/model.safetensors", "does not exist"),
        ("nowhere/model.safetensors", "does not exist"),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_a_path_that_is_not_there(name, reason):
    assert reason in refusal_of(name)


def test_a_folder_that_is_no_pipeline(tmp_path):
    assert "has no model_index.json" in refusal_of(tmp_path)


def test_a_file_that_is_no_checkpoint(tmp_path):
    (tmp_path / "model.txt").write_text("hello")

    assert "is not a .safetensors file" in refusal_of(tmp_path / "model.txt")


def test_a_prediction_that_no_sampler_knows_is_refused(folder):
    """At the door, and not job by job."""
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "flow_prediction"}))

    assert "predicts 'flow_prediction': name a model that predicts epsilon, v_prediction, sample" in refusal_of(folder)


def test_another_family_of_models_is_refused(folder):
    checkpoint = load_checkpoint(str(folder))
    checkpoint.unet.register_to_config(addition_embed_type="text_time")

    with pytest.raises(ConfigurationError, match=r"not shaped like Stable Diffusion 1\.x"):
        loading._check_shape(checkpoint, "sdxl")


def test_a_hub_id_is_downloaded_without_pickles(monkeypatch, tiny_4_channel_folder):
    asked = []

    def snapshot_download(hub_id, allow_patterns):
        asked.append((hub_id, allow_patterns))
        return str(tiny_4_channel_folder)

    monkeypatch.setattr(loading, "snapshot_download", snapshot_download)

    assert load_checkpoint("some-org/some-model").name == "some-org/some-model"
    [(hub_id, patterns)] = asked
    assert hub_id == "some-org/some-model"
    assert not [pattern for pattern in patterns if not pattern.endswith((".json", ".txt", "model.safetensors"))]


def test_a_hub_id_without_a_network(monkeypatch):
    def refuse(*_, **__):
        raise OSError("no route")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)

    assert "could not be downloaded" in refusal_of("nobody/nothing-here")


@pytest.mark.parametrize("devices", ["cpu, cpu", "cuda:1,cuda:1", "cuda,cuda:0"])
def test_a_device_is_named_once(devices, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    with pytest.raises(ConfigurationError, match=f"IMG2IMG_DEVICE={devices} names a device twice"):
        resolve_devices(devices)


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "meta"])
def test_a_device_that_cannot_be_used(device):
    with pytest.raises(ConfigurationError, match=f"IMG2IMG_DEVICE={device}.*use auto, cpu, cuda or cuda:1"):
        resolve_devices(device)


def test_auto_takes_the_gpu_where_there_is_one():
    assert resolve_devices("cpu") == (torch.device("cpu"),)
    assert resolve_devices("auto")[0].type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_loading_writes_nothing_to_the_terminal():
    script = "from worker.engines.diffusion.model import open_model; open_model('emoji-sd', 'cpu')"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert (done.stdout, done.stderr) == ("", "")


def test_the_protocol_and_the_fake_engine_do_without_torch():
    script = "import sys, worker.engines.base, worker.engines.fake, worker.images; print('torch' in sys.modules)"

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert done.stdout == "False\n"
