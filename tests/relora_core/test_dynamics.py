import math

import pytest
import torch
from training import Record, batch, build, run, run_in_processes, weights

from relora_core import dynamics, spectra
from relora_core.config import METHODS, ConfigError, adapted_shapes, validate
from relora_core.data.grammar import VOCAB_SIZE
from relora_core.dynamics import GradientTap, Recorder
from relora_core.model import Decoder
from relora_core.optim import set_lr_
from relora_core.redraws import Draws
from tests.conftest import nano_config

WHAT = ["weight", "base", "gradient", "update_proxy", "update_restart", "update_total"]
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "w_0", "w_1", "w_2"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def advance(model, method, optimizer, *, steps, start=0):
    for step in range(start, start + steps):
        set_lr_(optimizer, 1e-2)
        model(*batch(step)).backward()
        method.before_update(step, model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


# Singular values and what is made of them


@pytest.mark.parametrize(
    ("spectrum", "rank"),
    [
        ([1.0] * 7, 7.0),
        ([5.0, 0.0, 0.0], 1.0),
        ([0.0, 0.0], 0.0),
        ([2.0, 2.0, 0.0, 0.0], 2.0),
        ([2.0, 1.0, 1.0], 2 * math.sqrt(2)),  # entropy of (1/2, 1/4, 1/4) is 1.5 ln 2
        ([0.75, 0.25], math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4))),
    ],
)
def test_effective_rank_of_known_spectra(spectrum, rank):
    sigma = torch.tensor(spectrum, dtype=torch.float64)
    assert spectra.effective_rank(sigma).item() == pytest.approx(rank, rel=1e-14)
    scaled = spectra.effective_rank(sigma * 1e-30)
    assert scaled.item() == pytest.approx(rank, rel=1e-12)


def test_effective_rank_of_matrices():
    assert spectra.effective_rank(spectra.singular_values(torch.eye(9))).item() == pytest.approx(9)
    outer = normal(12, 1) @ normal(1, 5, seed=1)
    sigma = spectra.singular_values(outer)
    assert spectra.effective_rank(sigma).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30)])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_singular_values_of_many_are_those_of_each(shape, threads):
    """Small ones too, 14 orders below the largest; whatever number of threads share the work."""
    generator, before = torch.Generator().manual_seed(0), torch.get_num_threads()
    rows, columns = shape
    u = torch.linalg.qr(torch.randn(5, 2, rows, 20, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(5, 2, columns, 20, generator=generator, dtype=torch.float64)).Q
    sigma = torch.logspace(0, -14, 20, dtype=torch.float64)
    try:
        torch.set_num_threads(threads)
        computed = spectra.singular_values(u * sigma @ v.mT)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(computed[..., :20], sigma.expand(5, 2, 20), atol=1e-15, rtol=0)


def test_a_zero_matrix_and_a_broken_one_have_defined_values():
    broken = torch.full((3, 4), math.nan)
    sigma = spectra.singular_values(torch.stack((torch.zeros(3, 4), torch.ones(3, 4), broken)))
    noise = spectra.noise_floor(torch.linalg.vector_norm(sigma, dim=-1), dtype=torch.float32)
    assert spectra.effective_rank(sigma)[:2].tolist() == [0.0, pytest.approx(1.0)]
    assert spectra.effective_rank(sigma)[2].isnan()
    rank = spectra.numerical_rank(sigma, noise=noise)
    assert rank[:2].tolist() == [0, 1]
    assert rank[2].isnan()
    spectrum = dynamics.Spectrum(sigma=sigma, noise=noise, layers=[0, 1, 2])
    share = spectrum.values(d_inter=3)["noise_fraction"]
    assert share[:2].tolist() == [1, pytest.approx(2 / 3)]
    assert share[2].isnan()
    above = spectra.condition_number(sigma, noise=noise)
    assert above[0].isnan()
    assert above[1] == 1.0
    assert above[2].isnan()
    assert spectra.condition_number(torch.zeros(2)).isnan()
    assert spectra.condition_number(torch.tensor([2.0, 1.0, 0.0])).item() == math.inf


@pytest.mark.parametrize(("r", "shape"), [(4, (24, 96)), (16, (96, 384)), (1, (8, 8))])
def test_the_per_of_a_low_rank_product_is_at_most_r_over_the_smaller_side(r, shape):
    a, b = normal(r, shape[1]), normal(shape[0], r, seed=1)
    size = min(shape)
    for sigma in (spectra.singular_values(b @ a), spectra.product_singular_values(b, a)):
        per = spectra.proportional_effective_rank(sigma, size=size).item()
        assert 0.5 * r / size < per <= r / size * (1 + 1e-9)


def test_singular_values_of_a_product_need_not_form_it():
    left, right = normal(3, 20, 4), normal(3, 4, 15, seed=1)
    sigma = spectra.product_singular_values(left, right)
    assert sigma.shape == (3, 15)
    torch.testing.assert_close(sigma[:, :4], torch.linalg.svdvals(left @ right)[:, :4])
    assert torch.equal(sigma[:, 4:], torch.zeros(3, 11, dtype=torch.float64))
    wide = spectra.product_singular_values(normal(2, 9), normal(9, 3, seed=1))
    torch.testing.assert_close(wide, torch.linalg.svdvals(normal(2, 9) @ normal(9, 3, seed=1)))


def hilbert(n):
    index = torch.arange(n, dtype=torch.float64)
    return 1 / (index[:, None] + index + 1)


def hilbert_condition(n):
    """Norm of the matrix times the norm of its inverse, whose integers are known in closed form."""
    inverse = [
        [
            (-1) ** (i + j)
            * (i + j - 1)
            * math.comb(n + i - 1, n - j)
            * math.comb(n + j - 1, n - i)
            * math.comb(i + j - 2, i - 1) ** 2
            for j in range(1, n + 1)
        ]
        for i in range(1, n + 1)
    ]
    norms = [torch.linalg.matrix_norm(hilbert(n), 2)]
    norms.append(torch.linalg.matrix_norm(torch.tensor(inverse, dtype=torch.float64), 2))
    return (norms[0] * norms[1]).item()


@pytest.mark.parametrize("n", [2, 3, 5, 8])
def test_condition_numbers_of_hilbert_matrices(n):
    condition = spectra.condition_number(spectra.singular_values(hilbert(n))).item()
    assert condition == pytest.approx(hilbert_condition(n), rel=1e-5)
    if n == 2:  # its eigenvalues are (4 ± sqrt 13) / 6
        root = math.sqrt(13)
        assert condition == pytest.approx((4 + root) / (4 - root), rel=1e-13)


def test_what_float32_leaves_of_the_hilbert_matrix_of_order_twelve_is_said_to_be_noise():
    rounded = hilbert(12).float()
    sigma = spectra.singular_values(rounded)
    noise = spectra.noise_floor(torch.linalg.matrix_norm(rounded), dtype=torch.float32)
    assert 5 <= spectra.numerical_rank(sigma, noise=noise).item() <= 7
    assert spectra.condition_number(sigma, noise=noise).item() < 1 / torch.finfo(torch.float32).eps
    assert spectra.condition_number(sigma).item() < 1e-4 * hilbert_condition(12)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(torch.float32, 1e6, 1e9), (torch.bfloat16, 1e3, 1e5)],
)
def test_the_published_condition_number_of_a_product_is_the_noise_of_its_precision(
    dtype, low, high
):
    """96 x 384 of rank 16: sixteen singular values are real, the other eighty are rounding."""
    b, a = normal(96, 16), normal(16, 384, seed=1)
    product = b.to(dtype) @ a.to(dtype)
    sigma = spectra.singular_values(product)
    noise = spectra.noise_floor(torch.linalg.matrix_norm(product.double()), dtype=dtype)
    assert spectra.numerical_rank(sigma, noise=noise).item() == 16
    assert low < spectra.condition_number(sigma).item() < high
    exact = torch.linalg.svdvals(b @ a)
    true = (exact[0] / exact[15]).item()
    computed = spectra.condition_number(sigma, noise=noise).item()
    assert computed == pytest.approx(true, rel=0.02)


def test_rounding_is_always_below_the_noise_floor():
    """The bound: no singular value of what rounding adds exceeds half of it."""
    for dtype in (torch.float32, torch.bfloat16):
        matrix = normal(40, 60)
        rounding = torch.linalg.svdvals(matrix.to(dtype).double() - matrix)[0]
        assert rounding < spectra.noise_floor(torch.linalg.matrix_norm(matrix), dtype=dtype) / 2


# Intervals over layers


@pytest.mark.parametrize(("n", "quantile"), [(2, 12.706), (3, 4.303), (12, 2.201)])
def test_intervals_are_those_of_the_printed_table(n, quantile):
    """NIST/SEMATECH e-Handbook, 1.3.6.7.2: 0.975 at 1, 2 and 11 degrees of freedom."""
    values = normal(n)
    mean, low, high = dynamics.mean_interval(values.tolist())
    error = values.std().item() / math.sqrt(n)
    assert (high - mean) / error == pytest.approx(quantile, abs=5e-4)
    assert (mean - low) / error == pytest.approx(quantile, abs=5e-4)


def test_interval_over_layers():
    mean, low, high = dynamics.mean_interval([1.0, 2.0, 3.0, math.nan])
    assert mean == 2.0
    assert high - mean == pytest.approx(4.302652729911275 / math.sqrt(3))
    assert mean - low == pytest.approx(high - mean)
    assert dynamics.mean_interval([5.0])[0] == 5.0
    assert all(math.isnan(end) for end in dynamics.mean_interval([5.0])[1:])
    assert all(math.isnan(v) for v in dynamics.mean_interval([math.nan]))


# The OV circuit


def test_ov_and_vo_have_the_same_nonzero_eigenvalues_and_other_singular_values():
    v, o = spectra.heads(normal(1, 2 * 4, 24), normal(1, 24, 6 * 4, seed=1), n_heads=6)
    assert v.shape == (1, 6, 4, 24)
    assert o.shape == (1, 6, 24, 4)
    for head in range(6):
        vo, ov = v[0, head] @ o[0, head], o[0, head] @ v[0, head]
        small = torch.linalg.eigvals(vo)
        large = torch.linalg.eigvals(ov)
        large = large[large.abs().argsort(descending=True)]
        assert large[4:].abs().max() < 1e-9
        for value in small:
            assert (large[:4] - value).abs().min() < 1e-9
        ratio = torch.linalg.svdvals(ov)[:4] / torch.linalg.svdvals(vo)
        assert (ratio - 1).abs().max() > 0.1


def test_query_heads_share_the_value_head_of_their_group():
    """Head h reads value head h // (heads / kv), as attention does."""
    v = torch.arange(2.0).repeat_interleave(4)[None, :, None].expand(1, 8, 24)
    per_head, _ = spectra.heads(v, torch.zeros(1, 24, 24), n_heads=6)
    assert per_head[0, :, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]


def test_the_circuit_is_what_attention_to_one_position_computes(nano):
    """With one token, attention returns sum_h O_h V_h x."""
    model, _, _ = build(nano(method="full_rank"))
    attention = model.layers[0].attention
    v, o = spectra.heads(attention.v_proj.weight[None], attention.o_proj.weight[None], n_heads=4)
    x = torch.randn(1, 1, 32, generator=generator())
    circuit = (o @ v).sum(dim=1)[0]
    torch.testing.assert_close(attention(x)[0, 0], circuit @ x[0, 0], atol=1e-6, rtol=1e-5)


def recorded(config, *, steps=0):
    """The spectra of a recorder by what and kind, after a few updates with a measured gradient."""
    model, method, optimizer = build(config)
    recorder = Recorder(config, model=model, method=method)
    advance(model, method, optimizer, steps=steps)
    with recorder.gradients(config.dynamics.every_steps):
        model(*batch(99)).backward()
    weights = dict(method.effective_weights(model))
    return {w: recorder.spectra(w) for w in config.dynamics.what}, weights


def test_shapes_and_values_of_the_four_circuits(nano):
    config = nano(dynamics={"every_steps": 1, "kinds": ["ov"], "what": ["weight", "gradient"]})
    measured, weights = recorded(config, steps=3)
    names = [f"layers.1.attention.{k}" for k in ("v_proj", "o_proj")]
    v_all, o_all = (weights[name].double() for name in names)
    v = [v_all[8 * (h // 2) : 8 * (h // 2) + 8] for h in range(4)]  # (8, 32), two value heads
    o = [o_all[:, 8 * h : 8 * h + 8] for h in range(4)]  # (32, 8)
    pairs = list(zip(o, v, strict=True))
    want = {
        "ov": torch.cat([a @ b for a, b in pairs], dim=1),  # (32, 4 * 32)
        "vo": torch.cat([b @ a for a, b in pairs], dim=1),  # (8, 4 * 8)
        "ov_head": torch.stack([a @ b for a, b in pairs]),  # (4, 32, 32)
        "vo_head": torch.stack([b @ a for a, b in pairs]),  # (4, 8, 8)
    }
    assert set(measured["weight"]) == set(want)
    for kind, matrix in want.items():
        sigma = measured["weight"][kind].sigma[1]
        torch.testing.assert_close(sigma, torch.linalg.svdvals(matrix), atol=1e-12, rtol=1e-9)
    assert set(measured["gradient"]) == {"ov", "ov_head"}


def test_the_change_of_a_circuit_is_its_derivative(nano):
    """O dV + dO V against a difference quotient of O V in float64."""
    config = nano(dynamics={"every_steps": 1, "kinds": ["ov"], "what": ["update_total"]})
    measured, weights = recorded(config, steps=3)
    torch.manual_seed(config.seed)
    initial = dict(Decoder(config.model).named_parameters())
    names = [f"layers.0.attention.{k}" for k in ("v_proj", "o_proj")]
    now = [weights[n].double() for n in names]
    change = [w - initial[f"{n}.weight"].double() for n, w in zip(names, now, strict=True)]

    def circuits(t):
        moved = [(w + t * d)[None] for w, d in zip(now, change, strict=True)]
        v, o = spectra.heads(*moved, n_heads=4)
        return torch.cat(list((o @ v)[0]), dim=-1)

    quotient = (circuits(1e-3) - circuits(-1e-3)) / 2e-3  # exact for a quadratic
    sigma = measured["update_total"]["ov"].sigma[0]
    torch.testing.assert_close(sigma, torch.linalg.svdvals(quotient), atol=1e-7, rtol=1e-4)


# Gradients of the effective weight


def explicit_gradients(config, model, method, chunks):
    """Autograd's gradient of plain linears that hold W + s B A."""
    plain = Decoder(config.model)
    state = {k: v for k, v in model.state_dict().items() if k in plain.state_dict()}
    plain.load_state_dict(state, strict=False)  # of the linears some have no weight of their own
    with torch.no_grad():
        for name, weight in method.effective_weights(model):
            plain.get_submodule(name).weight.copy_(weight)
    for ids, labels in chunks:
        (plain(ids, labels) / len(chunks)).backward()
    return {n: plain.get_submodule(n).weight.grad for n, _ in method.effective_weights(model)}


@pytest.mark.parametrize("method_name", METHODS)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_hooks_give_autograds_gradient_of_the_effective_weight(nano, method_name, micro_batches):
    config = nano(method=method_name, relora={"dropout": 0.0})
    model, method, optimizer = build(config)
    advance(model, method, optimizer, steps=3)
    names = [name for name, _ in method.effective_weights(model)]
    tap = GradientTap({name: model.get_submodule(name) for name in names})
    ids, labels = batch(7)
    pairs = zip(ids.chunk(micro_batches), labels.chunk(micro_batches), strict=True)
    chunks = list(pairs)
    with tap.open():
        for part in chunks:
            (model(*part) / micro_batches).backward()
    want = explicit_gradients(config, model, method, chunks)
    assert set(tap.gradients) == set(want)
    assert len(want) == 14
    for name, gradient in want.items():
        scale = gradient.abs().max()
        assert scale > 0
        torch.testing.assert_close(tap.gradients[name], gradient, atol=1e-5 * scale, rtol=1e-5)
    tapped = dict(tap.gradients)
    model(*batch(8)).backward()  # closed: it listens no more
    assert all(tap.gradients[n] is g for n, g in tapped.items())


# The recorder


def test_updates_are_of_the_rank_that_the_method_allows(nano):
    """One cycle of rank 4 moves W by rank 4, two cycles by rank 8; full rank by more."""
    changes = {"every_steps": 1, "what": ["update_total", "update_restart"], "kinds": ["w_2"]}
    ranks = {}
    for name in ("relora", "full_rank"):
        config = nano(method=name, dynamics=changes)
        model, method, optimizer = build(config)
        recorder = Recorder(config, model=model, method=method)
        for step in range(4):
            advance(model, method, optimizer, steps=1, start=step)
        first, _ = recorder.measure()
        method.after_step(4, model, optimizer)
        recorder.after_restart()
        at_restart, _ = recorder.measure()
        for step in range(4, 7):
            advance(model, method, optimizer, steps=1, start=step)
        second, _ = recorder.measure()
        key = "dynamics/{}/w_2/numerical_rank"
        ranks[name] = [
            (m[key.format("update_restart")], m[key.format("update_total")])
            for m in (first, at_restart, second)
        ]
    assert ranks["relora"] == [(4, 4), (0, 4), (4, 8)]
    assert ranks["full_rank"][0][1] > 8


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"restart_groups": 2},
        {"restart_groups": 3, "after_merge": "restore"},
        {"rank_schedule": [[8, 2], [12, 6]]},
        {"adaptive_rank_energy": 0.9},
        {"warm_start_steps": 4},
        {"warm_start_steps": 2, "full_rank_steps": 3, "low_rank_steps": 7, "restart_groups": 2},
        {"full_rank_modules": ["last:1"]},
    ],
    ids=str,
)
def test_no_update_is_of_a_higher_rank_than_the_config_says(nano, knobs):
    """At every step of 20 and in every layer; and what is said is reached somewhere."""
    config = nano(
        train={"steps": 20},
        relora=knobs,
        dynamics={"every_steps": 1, "what": ["update_proxy", "update_restart"], "kinds": ["w_2"]},
    )
    model, method, optimizer = build(config)
    recorder = Recorder(config, model=model, method=method)
    draws, names = Draws(config), list(adapted_shapes(config))
    assert [name for name, _ in method.adapters(model)] == names  # whose turn it is, by their place
    reached, highest = set(), 0
    for step in range(1, 20):
        advance(model, method, optimizer, steps=1, start=step - 1)
        for row in recorder.measure()[1]:
            name = f"layers.{row['layer']}.swiglu.w_2"
            if row["what"] == "update_proxy":
                most = draws.rank(step, names.index(name))
            else:
                most = draws.update_rank(step, name)
                highest = max(highest, most) if most < 32 else highest
            assert row["numerical_rank"] <= most, (step, row)
            if row["numerical_rank"] == most:
                reached.add((row["what"], most))
        method.after_step(step, model, optimizer)
        if method.redraws(step):
            recorder.after_restart()
        method.set_phase(step, model)
    assert ("update_restart", highest) in reached
    assert highest == (6 if "rank_schedule" in knobs else 8 if "restart_groups" in knobs else 4)


def test_singular_matrices_left_out_of_a_mean_are_counted(nano):
    """With noise and all, as published, an exactly singular matrix has an infinite condition."""
    sigma = torch.tensor([[4.0, 2.0], [3.0, 0.0], [0.0, 0.0], [6.0, 1.0]], dtype=torch.float64)
    spectrum = dynamics.Spectrum(sigma=sigma, noise=torch.zeros(4), layers=[0, 1, 2, 3])
    values = spectrum.values(d_inter=2)
    summary = dynamics.summary(values)
    assert summary["condition_number_all"] == 4.0  # of 2 and 6; a zero matrix has none
    assert summary["condition_number_all_infinite"] == 1
    rows = dynamics.table(values, what="weight", kind="w_2", layers=[0, 1, 2, 3])
    all_of_them = [(r["condition_number_all"], r["condition_number_all_infinite"]) for r in rows]
    assert all_of_them == [(2.0, 0), (None, 1), (None, 0), (6.0, 0)]
    heads = dynamics.Spectrum(sigma=sigma[None], noise=torch.zeros(1, 4), layers=[0])
    summary = dynamics.summary(heads.values(d_inter=2))
    assert summary["condition_number_all"] == 4.0
    assert summary["condition_number_all_infinite"] == 1
    single = dynamics.Spectrum(sigma=sigma[1:2], noise=torch.zeros(1), layers=[0])
    summary = dynamics.summary(single.values(d_inter=2))
    assert "condition_number_all" not in summary
    assert summary["condition_number_all_infinite"] == 1


def test_each_metric_is_the_mean_of_its_table_rows(nano):
    config = nano(dynamics={"every_steps": 1, "what": WHAT, "kinds": [*LINEARS, "ov"]})
    model, method, optimizer = build(config)
    recorder = Recorder(config, model=model, method=method)
    advance(model, method, optimizer, steps=2)
    with recorder.gradients(1):
        model(*batch(9)).backward()
    metrics, rows = recorder.measure()
    kinds = {(r["what"], r["kind"]) for r in rows}
    circuits = {(w, k) for w in ("weight", "base") for k in ("ov", "vo", "ov_head", "vo_head")}
    circuits |= {(w, k) for w in WHAT[2:] for k in ("ov", "ov_head")}
    assert kinds == {(w, k) for w in WHAT for k in LINEARS} | circuits
    assert [r["layer"] for r in rows[:2]] == [0, 1]
    for what, kind in kinds:
        here = [r for r in rows if (r["what"], r["kind"]) == (what, kind)]
        assert len(here) == 2
        for name in ("per", "per_d_inter", "effective_rank", "condition_number", "numerical_rank"):
            mean = sum(r[name] for r in here) / 2
            assert metrics[f"dynamics/{what}/{kind}/{name}"] == pytest.approx(mean), name
        low, high = (metrics[f"dynamics/{what}/{kind}/per_ci_{end}"] for end in ("low", "high"))
        assert (low + high) / 2 == pytest.approx(metrics[f"dynamics/{what}/{kind}/per"])
    w_2 = {n: metrics[f"dynamics/weight/w_2/{n}"] for n in ("per", "per_d_inter", "effective_rank")}
    assert w_2["per"] == pytest.approx(w_2["effective_rank"] / 32)  # min(32, 48)
    assert w_2["per_d_inter"] == pytest.approx(w_2["effective_rank"] / 48)  # d_ff
    assert metrics["dynamics/update_proxy/w_2/numerical_rank"] == 4
    assert metrics["dynamics/update_proxy/w_2/noise_fraction"] == pytest.approx(1 - 4 / 32)
    assert metrics["dynamics/update_proxy/w_2/per"] <= 4 / 32 * (1 + 1e-5)
    assert metrics["dynamics/weight/w_2/noise_fraction"] == 0


def test_before_the_first_update_nothing_has_moved(nano):
    config = nano(dynamics={"every_steps": 1, "what": WHAT, "kinds": ["w_2", "ov"]})
    model, method, _ = build(config)
    metrics, rows = Recorder(config, model=model, method=method).measure()
    assert not any("gradient" in name for name in metrics)
    for what in WHAT[3:]:
        assert metrics[f"dynamics/{what}/w_2/per"] == 0
        assert metrics[f"dynamics/{what}/w_2/numerical_rank"] == 0
        assert f"dynamics/{what}/w_2/condition_number" not in metrics
        assert all(r["condition_number"] is None for r in rows if r["what"] == what)


def test_partly_adapted_models_have_a_product_only_where_there_is_an_adapter(nano):
    config = nano(
        relora={"target_modules": ["layers.1.attention.v_proj"]},
        dynamics={"every_steps": 1, "what": ["update_proxy", "base"]},
    )
    model, method, _ = build(config)
    _, rows = Recorder(config, model=model, method=method).measure()
    proxies = {(r["kind"], r["layer"]) for r in rows if r["what"] == "update_proxy"}
    assert proxies == {("v_proj", 1), ("ov", 1), ("ov_head", 1)}
    bases = {r["kind"] for r in rows if r["what"] == "base"}
    assert bases == {"v_proj", "o_proj", "w_2", "ov", "ov_head", "vo", "vo_head"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_proxy_is_formed_in_the_precision_of_training_as_published(nano, precision):
    config = nano(
        train={"precision": precision},
        dynamics={"every_steps": 1, "what": ["update_proxy"], "kinds": ["w_2"]},
    )
    model, method, optimizer = build(config)
    recorder = Recorder(config, model=model, method=method)
    advance(model, method, optimizer, steps=3)
    _, rows = recorder.measure()
    all_of_them = max(r["condition_number_all"] for r in rows)
    assert (all_of_them > 1e6) == (precision == "fp32")
    assert all(r["condition_number"] < 1e3 for r in rows)
    assert all(r["numerical_rank"] <= 4 for r in rows)


# In training


def numbers(record: Record) -> dict:
    """Metrics, and the rows of the tables of dynamics."""
    tables = (e for e in record.events if e.kind == "table" and e.data["name"] == "dynamics")
    return record.metrics() | {(e.step, "rows"): e.data["rows"] for e in tables}


@pytest.fixture(scope="module")
def setting():
    def make(method, **changes):
        return nano_config(
            method=method,
            model={"vocab_size": VOCAB_SIZE},
            relora={"dropout": 0.2},
            train={"micro_batch_size": 2},
            checkpoint={"every_steps": 3},
            **changes,
        )

    return make


ON = {"every_steps": 2, "what": WHAT}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_measuring_changes_no_number_and_no_weight(setting, tmp_path, method):
    plain = run(setting(method), tmp_path / "plain").metrics()
    measured = numbers(run(setting(method, dynamics=ON), tmp_path / "measured"))
    assert {k: measured[k] for k in plain} == plain
    assert all("dynamics/" in name or name == "rows" for _, name in set(measured) - set(plain))
    one, two = (weights(tmp_path / name) for name in ("plain", "measured"))
    assert one.keys() == two.keys()
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())
    for what in ("weight", "base", "gradient", "update_restart", "update_total"):
        assert measured[12, f"dynamics/{what}/w_2/per"] > 0


@pytest.fixture(scope="module")
def uninterrupted(setting, tmp_path_factory):
    return numbers(run(setting("relora", dynamics=ON), tmp_path_factory.mktemp("run")))


@pytest.mark.slow
@pytest.mark.parametrize("die_at", [("train", 5), ("checkpoint", 6), ("train", 8), ("train", 11)])
def test_a_resumed_run_measures_the_same(setting, uninterrupted, tmp_path, die_at):
    """Restarts at 4 and 8, checkpoints at 3, 6, 9: killed after, at and between them."""
    config = setting("relora", dynamics=ON)
    first = run(config, tmp_path, die_at=die_at)
    second = run(config, tmp_path)
    start = second.events[0]
    assert start.data["resumed"]
    before = {k: v for k, v in numbers(first).items() if k[0] <= start.step}
    assert before | numbers(second) == uninterrupted


def test_a_restart_is_measured_before_it_happens(setting, tmp_path):
    """Else every update since the newest restart would be zero at the steps that matter most."""
    config = setting("relora", dynamics={"every_steps": 4, "what": ["update_restart", "base"]})
    log = run(config, tmp_path)
    kinds = [e.kind for e in log.events if e.step == 4 and e.kind in ("dynamics", "restart")]
    assert kinds == ["dynamics", "restart"]
    metrics = log.metrics()
    for step in (4, 8, 12):  # 4, 8 and 12, were they counted from the start
        assert metrics[step, "dynamics/update_restart/w_2/numerical_rank"] == 4
    assert metrics[4, "dynamics/base/w_2/per"] == metrics[0, "dynamics/base/w_2/per"]
    assert metrics[8, "dynamics/base/w_2/per"] != metrics[0, "dynamics/base/w_2/per"]


@pytest.mark.slow
def test_two_processes_measure_what_one_does(setting, tmp_path):
    """Gradients are those of the whole batch, and one rank speaks."""
    config = setting("relora", dynamics={"every_steps": 3, "what": WHAT, "kinds": ["w_2"]})
    config.relora.dropout, config.train.micro_batch_size = 0.0, 1
    one = run(config, tmp_path / "one").metrics()
    events = run_in_processes(config, tmp_path / "two", processes=2)
    steps = {step: metrics for kind, step, metrics in events if kind == "dynamics"}
    assert set(steps) == {0, 3, 6, 9, 12}
    for name in (f"dynamics/{what}/w_2/per" for what in WHAT):
        if "gradient" not in name:
            assert steps[12][name] == pytest.approx(one[12, name], rel=1e-2), name
    # Before rounding has grown, to the float32 digits that a different order of sums leaves.
    assert steps[3]["dynamics/gradient/w_2/per"] == pytest.approx(
        one[3, "dynamics/gradient/w_2/per"], rel=1e-4
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"what": ["wieght"]}, r"dynamics.what must name some of .* got 'wieght'\. .*'weight'\?"),
        ({"what": []}, r"dynamics.what must name at least one of weight, .* got \[\]"),
        ({"kinds": ["w2"]}, r"dynamics.kinds must name some of .* got 'w2'\. Did you mean 'w_2'\?"),
        ({"kinds": []}, r"dynamics.kinds must name at least one of q_proj, .* got \[\]"),
    ],
)
def test_unknown_measures_are_refused(nano, changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(nano(dynamics=changes))
