"""What cannot be answered under a rule does not start, and says why; nothing is causal in silence."""

from types import SimpleNamespace

import pytest
import torch
from folders import llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(llava(tmp_path_factory.mktemp("llava")))


def configured(folder, rule="mma", **options):
    from vllm.engine.arg_utils import EngineArgs

    overrides = {"attention_rule": rule} if rule else {}
    args = EngineArgs(folder, dtype="float32", max_model_len=512, hf_overrides=overrides, **options)
    return args.create_engine_config()


@pytest.fixture(autouse=True, scope="module")
def plugins():
    from vllm.plugins import load_general_plugins

    load_general_plugins()


@pytest.fixture
def layers():
    """A configuration with one attention layer, made without its weights, and the layer."""
    from vllm.model_executor.layers.attention import Attention

    layer = Attention.__new__(Attention)
    torch.nn.Module.__init__(layer)
    layer.query_quant = layer.kv_sharing_target_layer_name = None
    layer.attn_type = "decoder"
    layer.impl = SimpleNamespace(alibi_slopes=None, forward=lambda *asked, **more: None)
    compilation = SimpleNamespace(cudagraph_mode=None, static_forward_context={"layers.0": layer})
    return SimpleNamespace(compilation_config=compilation), layer


@pytest.mark.parametrize(
    ("rule", "options", "said"),
    [
        ("concentric", {}, "numbers the tokens in its own way"),
        ("mmaa", {}, "there is no attention rule 'mmaa'"),
        ("mma", {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "speculative decoding"),
        ("mma", {"enable_prompt_embeds": True}, "prompt embeddings"),
        (
            "mma",
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            "keys that another engine computed",
        ),
    ],
)
def test_it_does_not_start(folder, rule, options, said):
    with pytest.raises(ValueError, match=said):
        configured(folder, rule, **options)


def test_steps_are_made_long_enough_for_any_prompt(folder):
    config = configured(folder, max_num_batched_tokens=64, max_num_seqs=8, long_prefill_token_threshold=32)
    scheduler = config.scheduler_config
    assert scheduler.max_num_batched_tokens == scheduler.encoder_cache_size == 520
    assert scheduler.long_prefill_token_threshold == 0
    assert not config.compilation_config.pass_config.fuse_attn_quant
    assert config.cache_config.enable_prefix_caching


def test_a_cache_of_quantized_keys_is_not_reused(folder):
    config = configured(folder)
    config.cache_config.cache_dtype = "fp8"
    from aki.vllm import settings

    settings.lay(config)
    assert not config.cache_config.enable_prefix_caching
    assert settings.keeps_prompts_whole(config)


def test_without_a_rule_nothing_is_changed(folder):
    config = configured(folder, None, max_num_batched_tokens=64, max_num_seqs=8)
    assert config.scheduler_config.max_num_batched_tokens == 64


def test_a_full_graph_over_mixed_batches_is_refused(folder):
    from vllm.config import CUDAGraphMode

    from aki.vllm.layers import lay_layers
    from aki.vllm.settings import CannotServe

    config = configured(folder)
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
    with pytest.raises(CannotServe, match="full CUDA graph"):
        lay_layers(config, None)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"query_quant": object()}, "its queries come quantized"),
        ({"kv_sharing_target_layer_name": "layers.0"}, "it takes its keys from another layer"),
        ({"alibi_slopes": torch.ones(2)}, "it adds a bias of positions"),
    ],
)
def test_a_layer_whose_rows_cannot_be_done_again_is_refused(layers, what, said):
    from aki.vllm.layers import lay_layers
    from aki.vllm.settings import CannotServe

    config, layer = layers
    for name, value in what.items():
        setattr(layer.impl if name == "alibi_slopes" else layer, name, value)
    with pytest.raises(CannotServe, match=said):
        lay_layers(config, None)


def test_a_layer_that_is_no_plain_attention_is_refused_and_so_is_a_model_without_any(layers):
    from aki.vllm.layers import lay_layers
    from aki.vllm.settings import CannotServe

    config, layer = layers
    config.compilation_config.static_forward_context = {"layers.1": SimpleNamespace(impl=layer.impl)}
    with pytest.raises(CannotServe, match=r"layers\.1 is a SimpleNamespace"):
        lay_layers(config, None)
    config.compilation_config.static_forward_context = {}
    with pytest.raises(CannotServe, match="no attention layer"):
        lay_layers(config, None)


def test_an_output_that_comes_quantized_is_an_error_and_only_where_rows_are_done_again(layers):
    from aki.vllm.layers import lay_layers

    config, layer = layers
    done = []
    steps = SimpleNamespace(is_open=False, redo=lambda *given: done.append(given))
    assert lay_layers(config, steps) == ["layers.0"]
    asked = (layer, None, None, None, None, "metadata", None)
    layer.impl.forward(*asked, output_scale=torch.ones(1))
    steps.is_open = True
    layer.impl.forward(*asked)
    assert len(done) == 1
    for quantized in ("output_scale", "output_block_scale"):
        with pytest.raises(RuntimeError, match="comes quantized"):
            layer.impl.forward(*asked, **{quantized: torch.ones(1)})


def test_a_vllm_whose_inside_has_moved_starts_without_a_rule_and_not_with_one(folder, monkeypatch):
    from vllm.config import VllmConfig
    from vllm.v1.core.sched.scheduler import Scheduler

    from aki.vllm import hooks, plugin

    monkeypatch.setattr(VllmConfig, "__post_init__", VllmConfig.__post_init__)
    monkeypatch.delattr(Scheduler, "_try_schedule_encoder_inputs")
    with pytest.raises(hooks.VllmMoved, match="_try_schedule_encoder_inputs"):
        hooks.attach()
    plugin.register()
    configured(folder, None)
    with pytest.raises(ValueError, match="_try_schedule_encoder_inputs"):
        configured(folder)


def test_a_step_that_passes_the_layers_by_is_an_error():
    from aki.vllm.steps import Steps

    steps = Steps(None, lambda: [])
    steps.layers = ["a", "b"]
    scheduled = type("Scheduled", (), {"finished_req_ids": (), "scheduled_new_reqs": (), "num_scheduled_tokens": {}})
    known = type("Known", (), {"resumed_req_ids": set(), "req_ids": [], "num_computed_tokens": []})
    scheduled.scheduled_cached_reqs = known
    with pytest.raises(RuntimeError, match="2 of 2 attention layers"), steps.step(scheduled):
        steps.is_open = True


def test_an_unknown_cache_is_refused():
    from aki.vllm.cache import find_layout
    from aki.vllm.settings import CannotServe

    class Backend:
        forward_includes_kv_cache_update = False

        @staticmethod
        def get_name() -> str:
            return "STRANGE"

    class Impl:
        @staticmethod
        def do_kv_cache_update(layer, key, value, cache, slots):
            cache[0] = torch.cat([value, key], -1).transpose(0, 1)

    layer = type("Layer", (), {"impl": Impl, "attn_backend": Backend, "num_kv_heads": 2, "head_size": 4})
    layer.kv_cache, layer.dtype = torch.zeros(2, 2, 8, 8), torch.float32
    with pytest.raises(CannotServe, match="STRANGE"):
        find_layout("a layer", layer)
