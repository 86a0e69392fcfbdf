"""The policy against torch.distributions, and what it must keep of the table it was given."""

import numpy as np
import pytest
import torch
from torch.distributions import Dirichlet, LogNormal, Normal, kl_divergence

import epd
from epd.train.policy import Policy, dirichlet_kl, dirichlet_log_prob
from epd.train.reach import Reach, measured

TIMES = epd.schedule.flow(4)
R = [[0.7, 0.2], [0.335, 0.665], [0.5, 0.5], [0.1, 0.9]]  # unordered; equal
W = [[0.3, 0.7], [0.5, 0.5], [1.0, 0.0], [0.01, 0.99]]  # a point that is not asked for


def table(**changed):
    return epd.Table(**({"times": TIMES, "r": R, "w": W} | changed))


def moved(policy, seed=1):
    """The policy somewhere else than at its start."""
    rng = torch.Generator().manual_seed(seed)
    last = policy.net[-1]
    with torch.no_grad():
        last.weight.copy_(0.3 * torch.randn(last.weight.shape, generator=rng, dtype=torch.float64))
        last.bias.copy_(0.3 * torch.randn(last.bias.shape, generator=rng, dtype=torch.float64))
    return policy


def test_log_probability_and_divergence_are_those_of_torch():
    rng = np.random.default_rng(0)
    alpha, beta = (torch.from_numpy(rng.uniform(0.2, 30, (5, 4))) for _ in range(2))
    x = torch.from_numpy(rng.dirichlet(np.ones(4), (3, 5)))
    free = torch.ones(5, 4, dtype=torch.bool)
    torch.testing.assert_close(dirichlet_log_prob(x, alpha, free), Dirichlet(alpha).log_prob(x))
    torch.testing.assert_close(dirichlet_kl(alpha, beta, free), kl_divergence(Dirichlet(alpha), Dirichlet(beta)))


def test_entries_that_cannot_move_do_not_count():
    rng = np.random.default_rng(1)
    alpha, beta = (torch.from_numpy(rng.uniform(0.2, 30, (3, 4))) for _ in range(2))
    free = torch.tensor([[True, False, True, True], [False] * 4, [True] * 4])
    x = torch.from_numpy(rng.dirichlet(np.ones(3), 3))
    x = torch.stack([x[:, 0], torch.zeros(3, dtype=torch.float64), x[:, 1], x[:, 2]], 1)
    kept = [0, 2, 3]
    log_prob, kl = dirichlet_log_prob(x, alpha, free), dirichlet_kl(alpha, beta, free)
    torch.testing.assert_close(log_prob[0], Dirichlet(alpha[0, kept]).log_prob(x[0, kept]))
    torch.testing.assert_close(kl[0], kl_divergence(Dirichlet(alpha[0, kept]), Dirichlet(beta[0, kept])))
    assert log_prob[1] == kl[1] == 0


@pytest.mark.parametrize(
    "given",
    [
        table(),
        table(r=[[0.5, 1.0]] * 4, midpoint="arithmetic"),
        table(
            midpoint="arithmetic",
            start="history",
            weights="free",
            w=[[1.3, -0.2]] * 4,
            place=np.ones((4, 2, 1)),
        ),
        table(scale_dir=np.full((4, 2), 1.1), scale_time=np.full((4, 2), 0.97), order=3),
    ],
    ids=["simplex", "last point at the end", "free weights from history", "scales"],
)
@pytest.mark.parametrize("scales", [0.0, 0.05])
def test_at_the_start_its_mean_is_the_table(given, scales):
    policy = Policy(given, Reach(20.0, 20.0, scales))
    (found,) = policy.tables(policy().mean())
    for name in ("r", "w", "scale_dir", "scale_time"):
        np.testing.assert_allclose(getattr(found, name), getattr(given, name), rtol=0, atol=1e-12)
    for name in ("start", "midpoint", "weights", "order"):
        assert getattr(found, name) == getattr(given, name)


@pytest.mark.parametrize("scales", [0.0, 0.05])
def test_what_is_drawn_is_a_table_around_the_mean(scales):
    policy = moved(Policy(table(), Reach(40.0, 40.0, scales)))
    distribution = policy()
    drawn = distribution.draw(4000, np.random.default_rng(3))
    tables = policy.tables(drawn)
    (mean,) = policy.tables(distribution.mean())
    assert np.abs(mean.r - R).max() > 0.01
    for name in ("r", "w", *(("scale_dir", "scale_time") if scales else ())):
        values = np.stack([getattr(one, name) for one in tables])
        error = values.std(0) / np.sqrt(len(values))
        np.testing.assert_array_less(np.abs(values.mean(0) - getattr(mean, name)), 5 * error + 1e-9)
    assert all((one.w[2] == [1, 0]).all() and one.total_evaluations == 4 + 7 for one in tables)
    assert all((one.r[0, 0] > one.r[0, 1]) and one.r[2, 0] == one.r[2, 1] for one in tables)


def test_log_probability_of_a_draw_is_the_sum_of_its_parts():
    policy = moved(Policy(table(r=[[0.2, 0.7]] * 4, w=[[0.4, 0.6]] * 4), Reach(30.0, 30.0, 0.05)))
    d = policy()
    drawn = d.draw(5, np.random.default_rng(0))
    expected = Dirichlet(d.segments).log_prob(drawn.segments) + Dirichlet(d.weights).log_prob(drawn.weights)
    expected = expected + Normal(d.scales, 0.05).log_prob(drawn.scales).sum(-1)
    torch.testing.assert_close(d.log_prob(drawn), expected)
    other = moved(policy, seed=2)()
    pairs = [(Dirichlet(a), Dirichlet(b)) for a, b in ((d.segments, other.segments), (d.weights, other.weights))]
    expected = sum(kl_divergence(a, b) for a, b in pairs)
    expected = expected + kl_divergence(LogNormal(d.scales, 0.05), LogNormal(other.scales, 0.05)).sum(-1)
    torch.testing.assert_close(d.kl(other), expected)
    assert (d.kl(other) > 0).all()
    assert (d.kl(d) == 0).all()


def test_the_mode_is_where_the_density_is_highest():
    policy = moved(Policy(table(r=[[0.2, 0.7]] * 4, w=[[0.4, 0.6]] * 4), Reach(30.0, 30.0, 0.0)))
    d = policy()
    best = d.log_prob(d.mode())
    rng = np.random.default_rng(0)
    nearby = [x * torch.from_numpy(rng.uniform(0.9, 1.1, (200, *x.shape[1:]))) for x in d.mode()[:2]]
    nearby = [x / x.sum(-1, keepdim=True) for x in nearby]
    assert (d.log_prob(d.mode()._replace(segments=nearby[0], weights=nearby[1])) < best).all()
    with pytest.raises(ValueError, match="export its mean"):
        Policy(table(), Reach(20.0, 20.0, 0.0))().mode()


def test_gradients_reach_the_network():
    policy = Policy(table(), Reach(20.0, 20.0, 0.05))
    drawn = policy().draw(3, np.random.default_rng(0))
    policy().log_prob(drawn).sum().backward()
    gradient = policy.net[-1].weight.grad
    assert torch.isfinite(gradient).all()
    assert (gradient.abs().sum(1) > 0).sum() == sum(policy.sizes)


def test_a_table_without_anything_to_learn_is_refused():
    still = table(r=np.ones((4, 1)), w=np.ones((4, 1)), midpoint="arithmetic")
    with pytest.raises(ValueError, match="nothing in this table"):
        Policy(still, Reach(20.0, 20.0, 0.0))
    Policy(still, Reach(20.0, 20.0, 0.05))


def test_numbers_are_drawn_as_widely_as_leaves_pictures_alike():
    """In a world where pictures know how much every number moves them: each alone to 60 dB, a thousandth."""
    given = table(midpoint="arithmetic", w=[*W[:3], [0.2, 0.8]])
    rng = np.random.default_rng(2)
    positions, weights, scales = rng.uniform(0.05, 5, 4), rng.uniform(0.05, 5, 4), rng.uniform(0.05, 5, (4, 4))

    def numbers(one):
        logs = np.log(np.concatenate([one.scale_dir, one.scale_time], 1))
        return np.concatenate([(positions * one.r.T).T.ravel(), (weights * one.w.T).T.ravel(), (scales * logs).ravel()])

    def change(own, tables):
        """Of pictures that have a pixel for every number."""
        return np.array([np.sqrt(np.square(numbers(one) - numbers(own)).mean()) for one in tables])

    count = numbers(given).size
    reach = measured(given, change, 60.0)
    np.testing.assert_allclose(reach.scales * scales / np.sqrt(count), 1e-3, rtol=1e-2)
    drawn = Policy(given, reach)().draw(4000, np.random.default_rng(3))
    moved = Policy(given, reach).tables(drawn)
    far = np.stack([numbers(one) for one in moved]) - numbers(given)
    spread = np.sqrt(np.square(far).mean(0))
    by_position = np.sqrt(np.square(spread[:8]).reshape(4, 2).sum(1) / count)
    by_weight = np.sqrt(np.square(spread[8:16]).reshape(4, 2).sum(1) / count)
    np.testing.assert_allclose(by_position, 1e-3, rtol=0.45)  # moved against each other there, at random here
    np.testing.assert_allclose(by_weight[[0, 1, 3]], 1e-3, rtol=0.1)
    assert by_weight[2] == 0  # a point that is not asked for
    np.testing.assert_allclose(spread[16:] / np.sqrt(count), 1e-3, rtol=0.1)


def test_rounding_that_hides_a_number_is_told(caplog):
    measured(table(), lambda own, others: np.full(len(others), 1e-3), 75.0)
    assert "numbers change pictures more than to 75 dB however little they are moved" in caplog.text
