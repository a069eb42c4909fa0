import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from relora_core.config import ModelConfig
from relora_core.costs import parameters
from relora_core.methods import build_method
from relora_core.model import Decoder, RMSNorm, RoPE

SIZES = {
    # Weiss et al. 2025, Table 1: decoder, ReLoRA trainable, ReLoRA total
    "tiny": (96, 384, 11_282_784, 10_060_128, 11_682_144),
    "small": (384, 1536, 64_595_328, 40_240_512, 66_192_768),
}


def small_model(**changes) -> Decoder:
    torch.manual_seed(0)
    sizes = {"d_model": 24, "d_ff": 40, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2}
    return Decoder(ModelConfig(**{**sizes, "vocab_size": 101, "max_seq_len": 64, **changes}))


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts_are_the_papers(nano, size):
    d_model, d_ff, decoder, trainable, total = SIZES[size]
    model = ModelConfig(d_model=d_model, d_ff=d_ff, vocab_size=50304)
    relora = {"r": 16, "alpha": 32.0, "reset_frequency": 2000}
    config = nano(model={}, relora=relora)
    config.model = model
    with torch.device("meta"):
        built = Decoder(model)
        assert sum(p.numel() for p in built.parameters()) == decoder
        assert parameters(nano(method="full_rank", model=model)).total == decoder
    counted = parameters(config)
    assert (counted.trainable, counted.total) == (trainable, total)


def test_counted_parameters_are_those_of_the_model(nano):
    for method in ("full_rank", "lora", "relora"):
        config = nano(method=method, relora={"target_modules": ["swiglu", "q_proj"]})
        model = Decoder(config.model)
        build_method(config).adapt(model)
        counted = parameters(config)
        assert counted.total == sum(p.numel() for p in model.parameters())
        assert counted.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)


def to_halves(weight: Tensor, heads: int) -> Tensor:
    """Adjacent rotary pairs -> the two halves that Llama rotates, per head."""
    size = weight.shape[0] // heads
    order = [*range(0, size, 2), *range(1, size, 2)]
    return weight.view(heads, size, -1)[:, order].reshape(weight.shape)


def test_logits_equal_llamas():
    """An independent implementation of the architecture, with q and k permuted for its RoPE."""
    ours = small_model()
    c = ours.config
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=101,
            hidden_size=c.d_model,
            intermediate_size=c.d_ff,
            num_hidden_layers=c.n_layers,
            num_attention_heads=c.n_heads,
            num_key_value_heads=c.n_kv_heads,
            rms_norm_eps=c.norm_eps,
            max_position_embeddings=64,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    weights = {
        "model.embed_tokens.weight": ours.embedding_proj.weight,
        "model.norm.weight": ours.output_norm.weight,
        "lm_head.weight": ours.de_embedding_proj.weight,
    }
    for i, block in enumerate(ours.layers):
        at, ff, to = block.attention, block.swiglu, f"model.layers.{i}."
        weights |= {
            to + "self_attn.q_proj.weight": to_halves(at.q_proj.weight, c.n_heads),
            to + "self_attn.k_proj.weight": to_halves(at.k_proj.weight, c.n_kv_heads),
            to + "self_attn.v_proj.weight": at.v_proj.weight,
            to + "self_attn.o_proj.weight": at.o_proj.weight,
            to + "mlp.gate_proj.weight": ff.w_0.weight,
            to + "mlp.up_proj.weight": ff.w_1.weight,
            to + "mlp.down_proj.weight": ff.w_2.weight,
            to + "input_layernorm.weight": block.attention_norm.weight,
            to + "post_attention_layernorm.weight": block.swiglu_norm.weight,
        }
    theirs.load_state_dict(weights, strict=True)
    ids = torch.randint(0, 101, (2, 33), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ids), theirs(ids).logits, atol=1e-5, rtol=0)


def test_names_and_order_are_pico_decoders():
    names = [name for name, _ in small_model(n_layers=1).named_parameters()]
    assert names == [
        "embedding_proj.weight",
        *(f"layers.0.attention.{p}_proj.weight" for p in "qkvo"),
        *(f"layers.0.swiglu.w_{i}.weight" for i in range(3)),
        "layers.0.attention_norm.weight",
        "layers.0.swiglu_norm.weight",
        "output_norm.weight",
        "de_embedding_proj.weight",
    ]


def test_initialisation_is_torchs():
    model = small_model(d_model=96, d_ff=384, n_heads=12, n_kv_heads=4, vocab_size=5000)
    linear = model.layers[0].swiglu.w_2.weight
    assert linear.abs().max() <= 384**-0.5
    assert linear.std().item() == pytest.approx((3 * 384) ** -0.5, rel=0.02)
    assert model.embedding_proj.weight.std().item() == pytest.approx(1.0, rel=0.02)
    assert torch.equal(model.output_norm.weight, torch.ones(96))


def test_first_loss_is_log_vocabulary_plus_a_sixth():
    """Normed states have mean square 1 and head weights variance 1 / (3 d): logits vary by 1/3."""
    model = small_model(d_model=96, d_ff=384, n_heads=12, n_kv_heads=4, vocab_size=8192)
    ids = torch.randint(0, 8192, (32, 65), generator=torch.Generator().manual_seed(2))
    loss = model(ids[:, :-1], ids[:, 1:]).item()
    assert loss == pytest.approx(torch.tensor(8192.0).log().item() + 1 / 6, abs=0.05)


def test_logits_do_not_depend_on_later_tokens():
    model = small_model()
    ids = torch.randint(0, 101, (1, 20), generator=torch.Generator().manual_seed(3))
    changed = ids.clone()
    changed[0, 12:] = (changed[0, 12:] + 1) % 101
    with torch.no_grad():
        torch.testing.assert_close(model.logits(ids)[:, :12], model.logits(changed)[:, :12])


def test_rope_scores_depend_on_distance_alone():
    rope = RoPE(8, max_seq_len=64, theta=10000.0)
    x = torch.randn(1, 1, 2, 8, generator=torch.Generator().manual_seed(4)).expand(1, 64, 2, 8)
    q, k = rope(x)[0, :, 0], rope(x)[0, :, 1]
    assert (q[5] @ k[2]).item() == pytest.approx((q[50] @ k[47]).item(), abs=1e-4)
    assert torch.equal(rope(x)[0, 0], x[0, 0])


def test_rope_survives_a_cast_of_the_module():
    """A complex table would turn real in `.to(bfloat16)`."""
    rope = RoPE(8, max_seq_len=8, theta=10000.0)
    x = torch.randn(1, 8, 1, 8, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(
        rope.to(torch.bfloat16)(x), RoPE(8, max_seq_len=8, theta=1e4)(x), atol=0.05, rtol=0
    )


def test_rms_norm_of_low_precision_is_computed_in_float32():
    norm = RMSNorm(4, 1e-6)
    x = torch.tensor([[300.0, 400.0, 0.0, 0.0]], dtype=torch.float16)  # squares overflow float16
    torch.testing.assert_close(norm(x).float(), torch.tensor([[1.2, 1.6, 0, 0]]), atol=1e-3, rtol=0)


def test_too_long_input_is_refused():
    with pytest.raises(ValueError, match="65 tokens exceed max_seq_len=64"):
        small_model().hidden_states(torch.zeros(1, 65, dtype=torch.long))
