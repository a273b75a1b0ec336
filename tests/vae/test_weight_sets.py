"""Files of VAEs as other programs write them: every layout gives the numbers of the network with the same weights."""

import collections
import datetime
import enum
import pkgutil
import sys
import types

import pytest
import torch
from closeness import IMAGES, assert_close
from safetensors.torch import save_file
from tiny_vae import save_tiny_diffusers_vae, tiny_vae

from gait_latents.common.errors import UserError
from gait_latents.vae.load import load_vae, read_identity
from gait_latents.vae.tensor_names import with_dots

RAW, AVERAGED = tiny_vae(style="ldm", seed=1), tiny_vae(style="ldm", seed=2)
# The layout of FLUX and SD3, which earlier versions could not read.
FLUX = {"style": "ldm", "embed_dim": 16, "has_quant_conv": False}
FLUX_RAW, FLUX_AVERAGED = tiny_vae(seed=1, **FLUX), tiny_vae(seed=2, **FLUX)


def state_of(network, prefix=""):
    return {prefix + name: tensor.clone() for name, tensor in network.state_dict().items()}


def without_dots(network, prefix="model_ema."):
    return {prefix + name.replace(".", ""): tensor.clone() for name, tensor in network.state_dict().items()}


def assert_is(path, network):
    """Asserts that a file gives the numbers of a network, bit for bit, and its identity."""
    loaded = load_vae(path, "cpu")
    assert torch.equal(loaded.encode(IMAGES), network.encode(IMAGES))
    latents = torch.randn(2, network.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.decode(latents), network.decode(latents))
    assert loaded.identity.fingerprint == network.fingerprint == read_identity(path).fingerprint
    return loaded.identity


# --- layouts of the network --------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model.", "module.", "model.", "autoencoder._orig_mod."])
def test_a_vae_without_quant_conv_is_one_with_an_identity_in_its_place(tmp_path, prefix):
    save_file(state_of(FLUX_RAW, prefix), tmp_path / "ae.safetensors")
    identity = assert_is(tmp_path / "ae.safetensors", FLUX_RAW)
    usual = tiny_vae(style="ldm", embed_dim=16)
    eye = {"quant_conv": 32, "post_quant_conv": 16}
    same = state_of(FLUX_RAW) | {f"{n}.weight": torch.eye(c)[:, :, None, None] for n, c in eye.items()}
    usual.load_state_dict(same | {f"{name}.bias": torch.zeros(size) for name, size in eye.items()})
    assert_close(FLUX_RAW.encode(IMAGES), usual.encode(IMAGES), 1e-6)
    assert (identity.scale_factor, identity.shift_factor, identity.factors_are_assumed) == (0.3611, 0.1159, True)
    assert "FLUX" in identity.describe() and "(assumed" in identity.describe()
    shown = prefix and f"taken from the prefix {prefix}"
    assert identity.describe().endswith(shown) and "pixels in [-1, 1]" in identity.describe()


def test_the_transformer_beside_a_vae_of_sd3_tells_its_constants(tmp_path):
    beside = {"model.diffusion_model.joint_blocks.0.x.weight": torch.rand(2)}
    save_file(state_of(FLUX_RAW, "first_stage_model.") | beside, tmp_path / "sd3.safetensors")
    identity = assert_is(tmp_path / "sd3.safetensors", FLUX_RAW)
    assert (identity.scale_factor, identity.shift_factor, identity.factors_are_assumed) == (1.5305, 0.0609, True)
    assert identity.describe().endswith("left out: 1 tensor of model")
    save_file(state_of(FLUX_RAW), tmp_path / "x.safetensors", {"modelspec.architecture": "stable-diffusion-v3-medium"})
    assert read_identity(tmp_path / "x.safetensors").scale_factor == 1.5305


def test_constants_in_the_file_win_over_those_of_the_family(tmp_path):
    save_file(state_of(FLUX_RAW), tmp_path / "a.safetensors", {"scale_factor": "0.7", "shift_factor": "0.2"})
    torch.save({"state_dict": state_of(FLUX_RAW), "scaling_factor": 0.7, "shift_factor": 0.2}, tmp_path / "a.pt")
    for name in ("a.safetensors", "a.pt"):
        found = read_identity(tmp_path / name)
        assert (found.scale_factor, found.shift_factor, found.factors_are_assumed) == (0.7, 0.2, False)
    for senseless in ("x", torch.ones(16), None, [1], float("nan")):  # which earlier versions did not look at
        torch.save({"vae": state_of(RAW), "scaling_factor": senseless, "shift_factor": senseless}, tmp_path / "b.pt")
        found = read_identity(tmp_path / "b.pt")
        assert (found.scale_factor, found.shift_factor, found.factors_are_assumed) == (0.18215, 0.0, True)


@pytest.mark.parametrize(("multipliers", "levels"), [((1, 2, 2), (2,)), ((1, 1), (0, 1)), ((1, 2, 2), ())])
def test_attention_in_the_levels_is_read_off_the_names(tmp_path, multipliers, levels):
    network = tiny_vae(
        style="ldm", multipliers=multipliers, embed_dim=16, num_blocks=2, attention=levels, decoder_attention=levels
    )
    save_file(state_of(network), tmp_path / "kl_f16.safetensors")
    identity = assert_is(tmp_path / "kl_f16.safetensors", network)
    assert ("attention_levels" in identity.fingerprint["architecture"]) == bool(levels)
    bare = {name: t for name, t in state_of(network).items() if ".attn." not in name}
    plain = tiny_vae(style="ldm", multipliers=multipliers, embed_dim=16, num_blocks=2)
    plain.load_state_dict(bare)
    assert torch.equal(plain.encode(IMAGES), network.encode(IMAGES)) == (not levels)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"block_out_channels": (32, 64), "layers_per_block": 2},
        {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False},
        {
            "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
            "up_block_types": ("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
            "block_out_channels": (32, 64),
        },
    ],
)
def test_one_file_with_the_names_of_diffusers_gives_what_diffusers_gives(tmp_path, config):
    model = save_tiny_diffusers_vae(tmp_path / "folder", **config)
    state = {f"vae.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(state, tmp_path / "alone.safetensors")
    loaded = load_vae(tmp_path / "alone.safetensors", "cpu")
    latents = torch.randn(2, loaded.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        posterior = model.encode(IMAGES * 2 - 1).latent_dist
        assert_close(loaded.encode(IMAGES), torch.cat([posterior.mean, posterior.logvar], dim=1), 1e-5)
        assert_close(loaded.decode_raw(latents), model.decode(latents).sample / 2 + 0.5, 1e-5)
    assert "names of diffusers" in loaded.identity.describe() and loaded.pixel_range == (-1, 1)


def test_the_weights_beside_a_config_are_read_with_it(tmp_path):
    save_tiny_diffusers_vae(tmp_path / "vae", scaling_factor=0.3)
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    assert read_identity(file) == read_identity(tmp_path / "vae") and read_identity(file).scale_factor == 0.3


def test_attention_as_matrices_and_quant_conv_in_the_encoder_are_the_same_vae(tmp_path):
    state = {n: t[:, :, 0, 0] if ".attn_1." in n and t.ndim == 4 else t for n, t in state_of(RAW).items()}
    state = {n if "quant" not in n else f"{'de' if 'post' in n else 'en'}coder.{n}": t for n, t in state.items()}
    torch.save(state, tmp_path / "vae.pt")
    assert_is(tmp_path / "vae.pt", RAW)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float64])
def test_other_number_formats_load_as_float32_with_the_values_in_the_file(tmp_path, dtype):
    save_file({name: t.to(dtype) for name, t in state_of(FLUX_RAW).items()}, tmp_path / "vae.safetensors")
    network = tiny_vae(**FLUX)
    network.load_state_dict({name: t.to(dtype).float() for name, t in state_of(FLUX_RAW).items()})
    assert_is(tmp_path / "vae.safetensors", network)


# --- raw and averaged weights ------------------------------------------------------------------------------


LAYOUTS = {  # how raw and averaged weights lie in a file: (what is made of the two, where the averages are)
    "keys": (lambda raw, avg: {"model": state_of(raw), "ema": state_of(avg), "step": 7}, "the key ema"),
    "averages first": (lambda raw, avg: {"ema": state_of(avg), "model_state_dict": state_of(raw)}, "the key ema"),
    "timm": (lambda raw, avg: {"state_dict": state_of(raw), "state_dict_ema": state_of(avg)}, "the key state_dict_ema"),
    "a key in a key": (
        lambda raw, avg: {"model": state_of(raw), "averages": {"model": state_of(avg)}},
        "the key averages/model",
    ),
    "ema_pytorch": (
        lambda raw, avg: {"vae": state_of(raw), "ema": state_of(avg, "ema_model.") | state_of(raw, "online_model.")},
        "the key ema and the prefix ema_model.",
    ),
    "prefixes": (
        lambda raw, avg: {"state_dict": state_of(raw, "model.") | state_of(avg, "ema.")},
        "the key state_dict and the prefix ema.",
    ),
    "LDM": (
        lambda raw, avg: {"state_dict": state_of(raw) | without_dots(avg)},
        "the key state_dict and the prefix model_ema.",
    ),
    "a list": (
        lambda raw, avg: {"model": state_of(raw), "ema": {"decay": 0.9, "shadow_params": [*state_of(avg).values()]}},
        "the key ema/shadow_params",
    ),
}
TAKEN_BEFORE = {"prefixes": AVERAGED}  # of files that earlier versions read; of the others they took the raw weights


@pytest.mark.parametrize("layout", LAYOUTS)
def test_averaged_weights_win_in_every_layout_that_earlier_versions_could_not_read(tmp_path, layout):
    make, place = LAYOUTS[layout]
    torch.save(make(FLUX_RAW, FLUX_AVERAGED), tmp_path / "vae.pt")
    told = assert_is(tmp_path / "vae.pt", FLUX_AVERAGED).describe()
    assert f"taken from averaged weights under {place}; left out: raw weights under " in told


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files_that_earlier_versions_read_give_the_same_weights_as_then(tmp_path, layout):
    make, place = LAYOUTS[layout]
    torch.save(make(RAW, AVERAGED), tmp_path / "vae.pt")
    taken = TAKEN_BEFORE.get(layout, RAW)
    told = assert_is(tmp_path / "vae.pt", taken).describe()
    wanted = (
        f"left out: averaged weights under {place}" if taken is RAW else f"taken from averaged weights under {place}"
    )
    assert wanted in told


@pytest.mark.parametrize(
    "content",
    [
        {"ema": state_of(AVERAGED), "step": 7},
        {"state_dict_ema": state_of(AVERAGED)},
        {"state_dict": without_dots(AVERAGED)},
        {"module." + name: tensor for name, tensor in state_of(AVERAGED).items()} | {"n_averaged": torch.tensor(3)},
        {"model": {"encoder.conv_in.weight": torch.rand(32, 3, 3, 3)}, "ema": state_of(AVERAGED)},
    ],
)
def test_averaged_weights_that_are_the_only_complete_ones_are_taken_and_told(tmp_path, content):
    torch.save(content, tmp_path / "vae.pt")
    assert "taken from averaged weights" in assert_is(tmp_path / "vae.pt", AVERAGED).describe()


@pytest.mark.parametrize(
    "key", ["ema9999", "emas", "modelEMA", "EMAModel", "ema-0.999", "g_ema", "swaModel", "Averaged"]
)
def test_a_key_names_averages_however_its_words_are_set_apart(tmp_path, key):
    torch.save({"model": state_of(FLUX_RAW), key: state_of(FLUX_AVERAGED)}, tmp_path / "vae.pt")
    identity = assert_is(tmp_path / "vae.pt", FLUX_AVERAGED)
    assert identity.describe().endswith(
        f"averaged weights under the key {key}; left out: raw weights under the key model"
    )


@pytest.mark.parametrize("key", ["schema", "remake", "emanator", "avgpool"])
def test_a_key_with_the_letters_of_averages_inside_a_word_names_none(tmp_path, key):
    torch.save({"model": state_of(FLUX_RAW), key: state_of(FLUX_AVERAGED)}, tmp_path / "vae.pt")
    assert assert_is(tmp_path / "vae.pt", FLUX_RAW).describe().endswith(f"left out: raw weights under the key {key}")


def test_raw_weights_beside_their_averages_under_a_key_of_averages_are_raw(tmp_path):
    both = state_of(FLUX_RAW, "online_model.") | state_of(FLUX_AVERAGED, "ema_model.")
    torch.save({"ema": both}, tmp_path / "vae.pt")
    told = assert_is(tmp_path / "vae.pt", FLUX_AVERAGED).describe()
    assert told.endswith("left out: raw weights under the key ema and the prefix online_model.")


def test_weights_in_many_mappings_are_found_where_none_are_further_out(tmp_path):
    torch.save({"checkpoint": {"model": {"state_dict": {"vae": state_of(RAW)}}}}, tmp_path / "deep.pt")
    told = assert_is(tmp_path / "deep.pt", RAW).describe()
    assert told.endswith("taken from the key checkpoint/model/state_dict/vae")
    outer = {"a": {"b": {"c": state_of(RAW)}}, "weights": state_of(AVERAGED)}
    torch.save(outer, tmp_path / "both.pt")
    assert_is(tmp_path / "both.pt", AVERAGED)


@pytest.mark.parametrize("layout", [{}, {"has_quant_conv": False}])
def test_an_autoencoder_whose_encoder_makes_no_variances_is_refused_by_its_encoder_alone(tmp_path, layout):
    encoder, decoder = (tiny_vae(style="ldm", embed_dim=size, **layout).state_dict() for size in (2, 4))
    plain = {name: value for name, value in encoder.items() if name.startswith(("encoder.", "quant_conv."))}
    plain |= {name: value for name, value in decoder.items() if name.startswith(("decoder.", "post_quant_conv."))}
    save_file(plain | {"quantizer.codebook": torch.rand(8, 4)}, tmp_path / "vae.safetensors")
    with pytest.raises(
        UserError, match=r"without moments, plain or vector-quantised: its encoder makes as many .*\(4\)"
    ):
        read_identity(tmp_path / "vae.safetensors")


def test_incomplete_averages_do_not_win(tmp_path):
    half = {name: tensor for name, tensor in state_of(FLUX_AVERAGED).items() if "encoder.down" not in name}
    torch.save({"model": state_of(FLUX_RAW), "ema": half}, tmp_path / "vae.pt")
    assert_is(tmp_path / "vae.pt", FLUX_RAW)


def test_what_lies_beside_a_vae_is_counted(tmp_path):
    beside = {f"first_stage_model.loss.{i}.weight": torch.rand(2) for i in range(12)}
    beside |= {"model_ema.decay": torch.rand(()), "cond_stage_model.a": torch.rand(2), "betas": torch.rand(2)}
    torch.save({"state_dict": state_of(RAW, "first_stage_model.") | beside, "epoch": 1}, tmp_path / "sd.ckpt")
    told = assert_is(tmp_path / "sd.ckpt", RAW).describe()
    assert "the key state_dict and the prefix first_stage_model.; left out: 12 tensors of loss, 1 tensor of" in told


def test_names_without_dots_get_them_back():
    names = {
        name.replace(".", ""): name for network in (RAW, tiny_vae(attention=(0,))) for name in network.state_dict()
    }
    assert [with_dots(short) for short in names] == list(names.values())
    assert with_dots("diffusion_modelinput_blocks00weight") is None and with_dots("1" * 200 + "x") is None


# --- objects of other programs -----------------------------------------------------------------------------


@pytest.fixture
def other_program(monkeypatch):
    """Classes of a module that is gone when the file is read, and a trace of their being called."""
    module, calls = types.ModuleType("other_program.callbacks"), []

    class Callback:
        def __setstate__(self, state):
            calls.append(state)

    class Slotted:
        __slots__ = ("a",)

    class Settings(dict):
        pass

    class Names(list):
        pass

    class Mode(enum.Enum):
        FAST = 1

    class Outer:
        class Inner:
            pass

    for kind in (Callback, Slotted, Settings, Names, Mode, Outer):
        kind.__module__, kind.__qualname__ = module.__name__, kind.__name__
        setattr(module, kind.__name__, kind)
    Outer.Inner.__module__, Outer.Inner.__qualname__ = module.__name__, "Outer.Inner"
    monkeypatch.setitem(sys.modules, "other_program", types.ModuleType("other_program"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module, calls


def test_objects_of_other_programs_in_a_checkpoint_are_neither_imported_nor_called(
    tmp_path, monkeypatch, other_program
):
    module, calls = other_program
    callback, slotted, settings = module.Callback(), module.Slotted(), module.Settings(lr=1.0)
    callback.best, slotted.a, settings.more = torch.rand(2), 1, "x"
    others = {
        "callbacks": {module.Callback: {"best": torch.tensor(1.0)}, callback: 1},
        "hyper_parameters": settings,
        "names": module.Names(["a"]),
        "mode": module.Mode.FAST,
        "inner": module.Outer.Inner(),
        "slotted": slotted,
        "queue": collections.deque([1, 2], maxlen=3),
        "date": datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC),
        "space": types.SimpleNamespace(a=1),
    }
    for key, value in {**others, "all": others, "old": others}.items():
        content = {key: value, "state_dict": state_of(RAW), "global_step": 2}
        torch.save(content, tmp_path / f"{key}.ckpt", _use_new_zipfile_serialization=key != "old")
    monkeypatch.delitem(sys.modules, module.__name__)
    monkeypatch.delitem(sys.modules, "other_program")
    allowed = torch.serialization.get_safe_globals()
    paths = sorted(tmp_path.iterdir())
    for path in paths:
        identity = read_identity(path)
        assert identity.fingerprint == RAW.fingerprint
        if path.stem in ("callbacks", "all", "old"):
            assert "left out: objects of other programs, such as other_program.callbacks." in identity.describe()
    assert_is(tmp_path / "all.ckpt", RAW)
    assert len(paths) == 11 and not calls and module.__name__ not in sys.modules
    more = [found for found in torch.serialization.get_safe_globals() if found not in allowed]
    assert not [found for found in more if not getattr(found, "__module__", "").startswith("torch.")]  # imported late


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", ["subprocess.Popen", "os.system", "builtins.eval", "urllib.request.urlopen"])
def test_what_python_itself_can_run_is_refused_by_the_names_of_every_protocol(tmp_path, name, protocol):
    run = pkgutil.resolve_name(name.replace(".", ":") if name.count(".") == 1 else name)
    trace = tmp_path / "ran"

    class Harm:
        def __reduce__(self):
            return run, (f"open({str(trace)!r}, 'w')",)

    torch.save({"state_dict": state_of(RAW), "extra": Harm()}, tmp_path / "vae.pt", pickle_protocol=protocol)
    with pytest.raises(UserError, match=r"which is no weight and could run code, so it was not opened|cannot be read"):
        read_identity(tmp_path / "vae.pt")
    assert not trace.exists()


def test_a_file_with_a_thousand_classes_ends_in_one_line(tmp_path, monkeypatch):
    module = types.ModuleType("other_program")
    for number in range(150):
        setattr(module, f"C{number}", type(f"C{number}", (), {"__module__": "other_program"}))
    monkeypatch.setitem(sys.modules, "other_program", module)
    kinds = [value for name, value in vars(module).items() if name.startswith("C")]
    torch.save({"kinds": kinds, "state_dict": state_of(RAW)}, tmp_path / "vae.pt")
    monkeypatch.delitem(sys.modules, "other_program")
    with pytest.raises(UserError, match=r"holds other_program\.C100, which is no weight"):
        read_identity(tmp_path / "vae.pt")
    assert len(kinds) == 150
