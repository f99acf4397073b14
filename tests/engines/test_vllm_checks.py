"""What engine=vllm says before it starts: of settings, models and prompts. Needs no vLLM."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from shardes.config.schema import ESConfig, Noise
from shardes.engines import check_model, vllm
from shardes.engines.vllm import check_context, check_processors, check_vllm
from shardes.engines.vllm_adapters import Slots
from shardes.engines.vllm_regions import NoPlace, Piece, _is_partition, find_pieces
from shardes.errors import ConfigError
from shardes.es.adapted_members import adapter_slots, check_adapters
from shardes.es.side_by_side import members_together
from shardes.inference.vllm_generation import check_rotary
from shardes.sharding.regions import Region
from vllm_models import HEADS_OF_32, MODELS, config


class Fused(nn.Module):
    """A model that loads as vLLM's do: two tensors into one parameter with padding, one
    transposed.
    """

    def __init__(self):
        super().__init__()
        self.both = nn.Parameter(torch.zeros(6, 3))
        self.turned = nn.Parameter(torch.zeros(2, 4))

    def load_weights(self, weights):
        for name, tensor in weights:
            if name == "turned":
                self.turned.data.copy_(tensor.t())
            else:
                first = {"first": 0, "second": 2}[name]
                self.both.data.narrow(0, first, len(tensor)).copy_(tensor)


class Computing(Fused):
    def load_weights(self, weights):
        for _, tensor in weights:
            self.both.data[: len(tensor)].copy_(tensor + 1)


def test_pieces_say_which_elements_a_loader_copies_where():
    shapes = {"first": (2, 3), "second": (3, 3), "turned": (4, 2)}
    pieces = find_pieces(Fused(), shapes, torch.float32)
    columns = tuple(Region(start, 4, 1, 2) for start in (0, 1))
    assert pieces[:2] == [
        Piece("both", 0, "first", (Region.contiguous(0, 6),)),
        Piece("both", 6, "second", (Region.contiguous(0, 9),)),
    ]
    turned = [region.index(i) for region in pieces[2].regions for i in range(region.numel)]
    assert turned == [c.index(i) for c in columns for i in range(4)]


def test_a_loader_that_computes_is_refused():
    with pytest.raises(NoPlace, match="computes with the weights of both"):
        find_pieces(Computing(), {"first": (2, 3)}, torch.float32)


def test_ranks_count_an_element_once():
    whole = (Region.contiguous(0, 12),)
    halves = [(Region(start, 4, 2, 4),) for start in (0, 2)]  # of a 4 × 4 tensor
    assert _is_partition([tuple(vars(r).values()) for half in halves for r in half], 16)
    assert _is_partition([], 0) and not _is_partition([], 1)
    for regions in (whole, [*whole, Region.contiguous(10, 6)], [*whole, Region.contiguous(13, 3)]):
        assert not _is_partition([tuple(vars(r).values()) for r in regions], 16)


def test_vllm_that_is_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed
    with pytest.raises(ConfigError, match=r"^engine=vllm: vLLM is not installed; pip install"):
        check_vllm(config())


@pytest.mark.parametrize(
    "override, message",
    [
        ("sharding.shard=2", "sharding.shard=2: engine=vllm has no shard axis"),
        ("sharding.gather=layer", "sharding.gather=layer: engine=vllm gathers nothing"),
        ("sharding.offload=cpu", "sharding.offload=cpu: engine=vllm offloads nothing"),
        ("es.restore=subtract", "es.restore=subtract: engine=vllm needs the exact center"),
        ("generation.decode=graph", "generation.decode=graph: engine=vllm decodes by itself"),
    ],
)
def test_settings_that_it_does_not_have(override, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        check_vllm(config(override))


def test_an_older_vllm(monkeypatch):
    monkeypatch.setattr(vllm, "find_spec", lambda name: name)
    monkeypatch.setattr(vllm, "version", lambda name: "0.31.4+cpu")
    with pytest.raises(ConfigError, match=r"^engine=vllm: vLLM is 0.31.4\+cpu; .* least 0.32$"):
        check_vllm(config())


def test_a_vllm_that_cannot_be_imported(monkeypatch, tmp_path):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('undefined symbol')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setattr(vllm, "version", lambda name: "0.32.1")
    with pytest.raises(ConfigError, match=r"^engine=vllm: vLLM 0.32.1 cannot .* undefined symbol;"):
        check_vllm(config())


def test_processors_are_refused():
    with pytest.raises(ConfigError, match=r"does not apply repetition_penalty=1.1; set"):
        check_processors("repetition_penalty=1.1")


def test_rotary_frequencies_that_change_with_the_length():
    model = MODELS["llama"]()
    check_rotary(config(), model)
    factors = dict(short_factor=[1.0] * 16, long_factor=[2.0] * 16)
    scaled = dict(rope_type="longrope", original_max_position_embeddings=64, rope_theta=1e4)
    sizes = HEADS_OF_32 | dict(pad_token_id=0, original_max_position_embeddings=64)
    phi3 = Phi3ForCausalLM(Phi3Config(**sizes, rope_parameters=scaled | factors))
    for length, message in (
        ("null", "change at 64 tokens"),
        ("65", "set vllm.max_model_len=64, or"),
        ("64", ""),
    ):
        settings = config(f"vllm.max_model_len={length}")
        if not message:
            check_rotary(settings, phi3)
            continue
        with pytest.raises(ConfigError, match=f"^vllm.max_model_len: .*{message}"):
            check_rotary(settings, phi3)
    dynamic = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
    llama = LlamaForCausalLM(LlamaConfig(**HEADS_OF_32, rope_parameters=dynamic))
    with pytest.raises(ConfigError, match=r"^model.path=m: its rotary frequencies change"):
        check_rotary(config(), llama)


def test_experts_cannot_be_shared():
    es = ESConfig(noise=Noise.low_rank)
    check_adapters(MODELS["llama"](), es)
    with pytest.raises(ConfigError, match=r"cannot share \S*experts\S*, for which vLLM has no ada"):
        check_adapters(MODELS["qwen3_moe"](), es)
    check_adapters(MODELS["qwen3_moe"](), replace(es, evolve="self_attn"))


def test_members_of_a_group():
    settings = config("es.noise=low_rank", "es.population_size=30")
    assert members_together(settings, [10], 1) == 16 == adapter_slots(settings.es).number
    assert members_together(settings, [10], 4) == 4
    settings.es.members_per_batch = 30
    assert members_together(settings, [10], 1) == 30 == adapter_slots(settings.es).number
    settings.es.members_per_batch = 1
    assert adapter_slots(settings.es) is None
    assert Slots(3, 9).arguments()["max_lora_rank"] == 16


@pytest.mark.parametrize("tensor, heads", [(3, "4 attention"), (4, ""), (8, "4 attention")])
def test_heads_that_a_tensor_degree_does_not_split(tensor, heads):
    settings = config(f"sharding.tensor={tensor}")
    if not heads:  # two ranks hold each key-value head
        check_model(settings, MODELS["llama"]())
        return
    with pytest.raises(ConfigError, match=rf"^sharding.tensor={tensor}: .* the {heads} heads of m"):
        check_model(settings, MODELS["llama"]())


def test_a_prompt_must_fit_the_context():
    model = MODELS["llama"]()
    for overrides, context in ([], 512), (["vllm.max_model_len=40"], 40):
        settings = config(f"generation.max_new_tokens={context - 10}", *overrides)
        check_context(settings, model, "train", [[1] * 9])
        with pytest.raises(ConfigError, match=f"longest prompt of train has 10 .* {context} "):
            check_context(settings, model, "train", [[1], [1] * 10])
