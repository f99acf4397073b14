"""Members of low-rank noise that answer side by side answer as they do alone, or are refused."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from architectures import few_or_all, fill, tiny_config
from models import byte_tokenizer
from shardes.clock import Clock
from shardes.config.schema import Decode
from shardes.engines import linear
from shardes.errors import ConfigError
from shardes.es.member_terms import Factors, Rows, add_linear_term
from shardes.es.population import Member
from shardes.es.side_by_side import MatrixSlice, SideBySide
from shardes.inference.generation import Decoder
from shardes.noise import LowRank, add_noise
from shardes.sharding.regions import ParameterShard, Region, box_regions

PROMPTS = [list(range(40, 40 + n)) for n in (3, 11, 5)]
MEMBERS = [Member(7, 0.05), Member(9, 0.03), Member(7, -0.05)]  # two of one seed, as pairs are
NEW_TOKENS, END = 8, 256
# GPT-2's weights are transposed, Gemma's embedding is scaled, Phi-3's layers are fused.
FEW = ["llama", "gpt2", "gemma2", "phi3", "qwen3", "falcon", "qwen3_moe"]
# Convolutions, biased or transposed experts, and layers with forward passes of their own
REFUSED = {
    "bamba", "biogpt", "ernie4_5_moe", "falcon", "falcon new_decoder_architecture", 
    "falcon alibi", "falcon_h1", "falcon_mamba", "gemma3", "gpt_oss", "granitemoehybrid", "jamba",
    "jetmoe", "lfm2", "llama4_text", "mamba", "mamba2", "nemotron_h", "olmo_hybrid", "opt",
    "qwen3_next",
}  # fmt: skip


@pytest.mark.architectures
@pytest.mark.parametrize("rank", [1, 3])
@few_or_all(FEW)
def test_rows_answer_as_their_members_alone(names, rank):
    wrong = []
    for name in names:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(name)).eval()
        fill(model)
        try:
            side_by_side = SideBySide(model, shards_of(model), model.device, rank)
        except ConfigError as error:
            assert name in REFUSED and "set es.members_per_batch=1" in str(error), name
            continue
        expected = [
            generate(perturbed(model, member, rank), p) for member in MEMBERS for p in PROMPTS
        ]
        linear.use_own_forward(model)
        decode = Decoder(byte_tokenizer(), NEW_TOKENS, frozenset([END]), (), 65536)
        with side_by_side.members(MEMBERS, Clock()):
            numbers = [number for number in range(len(MEMBERS)) for _ in PROMPTS]
            answers = decode(
                model, PROMPTS * len(MEMBERS), members=numbers, set_members=side_by_side.set_rows
            )
        if answers != expected or name in REFUSED:
            wrong.append(name)
    assert wrong == []


def test_later_groups_use_the_memory_of_earlier_ones(tied_llama):
    """Captured decode steps read factors and rows at their addresses."""
    model = AutoModelForCausalLM.from_pretrained(tied_llama, dtype=torch.float32).eval()
    side_by_side = SideBySide(model, shards_of(model), model.device, 2)
    linear.use_own_forward(model)
    ends, layouts = frozenset([*range(24), END]), []
    eager, static = (
        Decoder(byte_tokenizer(), NEW_TOKENS, ends, (), 65536, decode=decode) for decode in Decode
    )

    def set_rows(members):
        layouts.append(side_by_side.set_rows(members))
        return layouts[-1]

    groups = [MEMBERS, [Member(3, 0.1), Member(4, 0.1)], [Member(5, 0.1)], MEMBERS]
    for group in groups:
        with side_by_side.members(group, Clock()):
            rows = PROMPTS * len(group), [m for m in range(len(group)) for _ in PROMPTS]
            expected = eager(model, rows[0], members=rows[1], set_members=side_by_side.set_rows)
            assert static(model, rows[0], members=rows[1], set_members=set_rows) == expected
    assert len(layouts) > 8 and len(set(layouts[1:])) == 1


def shards_of(model: nn.Module) -> list[ParameterShard]:
    shards = []
    for name, param in model.named_parameters():
        whole = (Region.contiguous(0, param.numel()),)
        shards.append(
            ParameterShard(name, tuple(param.shape), param.detach().view(-1), whole, whole)
        )
    return shards


def perturbed(model: nn.Module, member: Member, rank: int) -> nn.Module:
    model = copy.deepcopy(model)
    for shard in shards_of(model):
        low_rank = LowRank(shard.shape, rank)
        coefficients = [member.sigma]
        add_noise(
            shard.tensor, shard.name, shard.regions, [member.seed], coefficients, None, low_rank
        )
    return model


def generate(model, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=END,
        pad_token_id=257,
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("tokens, size", [(1, 8), (5, 8), (40, 300)])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_fast_term_is_that_of_plain_torch(tokens, size, rank):
    torch.manual_seed(1)
    rows = Rows(torch.device("cpu"))
    rows.set([2, 0, 0, 1], [0.5, 1.0, -1.0, 2.0])
    factors = Factors(torch.randn(3, rank, size + 3), torch.randn(3, rank, size))
    x, y = torch.randn(4, tokens, size), torch.randn(4, tokens, size + 3)
    fast, plain = y.clone(), y.double()
    add_linear_term("w", rows, factors, x, fast)
    factors = Factors(factors.a.double(), factors.b.double())
    add_linear_term("w", rows, factors, x.double(), plain)
    assert torch.allclose(fast.double(), plain, rtol=1e-4, atol=1e-3)
    flat = y.clone()
    add_linear_term(
        "w",
        rows,
        Factors(factors.a.float(), factors.b.float()),
        x.flatten(0, 1),
        flat.view(4 * tokens, -1),
    )
    assert torch.equal(flat, fast)


class SomeTokens(nn.Module):
    """A layer of an architecture that nobody has listed: it computes with chosen tokens."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen, out = x[..., 0] > 0, torch.zeros_like(x)
        out[chosen] = self.inner(x[chosen])
        return out


def test_a_layer_that_computes_with_some_of_the_rows_is_refused_by_name():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    fill(model)
    model.model.layers[1].mlp = SomeTokens(model.model.layers[1].mlp)
    linear.use_own_forward(model)
    side_by_side = SideBySide(model, shards_of(model), model.device, 1)
    decode = Decoder(byte_tokenizer(), NEW_TOKENS, frozenset(), (), 65536)
    numbers = [number for number in range(len(MEMBERS)) for _ in PROMPTS]
    problem = r"cannot share model\.layers\.1\.mlp\.inner\.gate_proj\.weight: .* of \d rows; set es"
    with side_by_side.members(MEMBERS, Clock()), pytest.raises(ConfigError, match=problem):
        decode(model, PROMPTS * 3, members=numbers, set_members=side_by_side.set_rows)


@pytest.mark.parametrize(
    "box, rows, cols",
    [
        ([(0, 6), (0, 8)], [range(6)], range(8)),
        ([(2, 3), (0, 8)], [range(2, 5)], range(8)),
        ([(0, 6), (4, 2)], [range(6)], range(4, 6)),
    ],
)
def test_a_slice_is_found_from_its_regions(box, rows, cols):
    lows, sizes = zip(*box, strict=True)
    found = MatrixSlice.of("w", (6, 8), box_regions((6, 8), lows, sizes))
    assert found.shape == (6, 8) and list(found.rows) == rows and found.cols == cols


def test_a_packed_slice_is_found_and_another_is_refused():
    packed = (Region.contiguous(8, 16), Region.contiguous(32, 16))
    assert MatrixSlice.of("w", (6, 8), packed).rows == (range(1, 3), range(4, 6))
    with pytest.raises(ConfigError, match=r"w is split in a way .* es\.members_per_batch=1"):
        MatrixSlice.of("w", (6, 8), (Region.contiguous(3, 7),))
