"""The paper's theory on a policy that is a table: one softmax over the answers to one prompt, exact
gradients.

An answer y has a logit; some answers are correct, with unequal probability under the base policy.
One update is the expected GRPO update (no sampling: a sum over all answers, group statistics at
their population values, ratio 1, so nothing is clipped):

    p        = sum of pi(y) over the correct y
    A(y)     = (r(y) - p) / (sqrt(p (1 - p)) + 1e-6)
    A^DS(y)  = A(y) - gamma_p log pi_old(y) if y is correct                                 (Eq. 6)
               A(y) + gamma_n log pi_old(y) otherwise
    logit(y) += lr * pi(y) (A^DS(y) - sum over y' of pi(y') A^DS(y'))

Correctness is p. The normalised variance over the correct answers is Var(pi(y)) / Mean(pi(y))^2, y
uniform over the correct answers: 0 if they are equally likely, their number less one if one of them
has all the probability. Lower is more diverse. It does not change when all correct answers gain by
the same factor.

`python tests/test_theory.py` prints the README's table.
"""
import functools

import numpy as np
import pytest

SEEDS = 20
ARMS = {"GRPO": (0, 0), "DS-GRPO": (0.3, 0.03), "uniform bonus": (0.3, -0.3),
        "uniform penalty": (-0.3, 0.3)}
# answers, correct ones, spread of the logits
SHAPES = [(40, 10, 1.0), (40, 10, 2.0), (40, 4, 1.0), (40, 20, 1.0), (100, 10, 1.0)]


@functools.cache
def base_policies(answers=40, correct=10, spread=1.0):
    """SEEDS base policies (SEEDS, answers) with normal logits, and which answers are correct, bool
    (SEEDS, answers)."""
    generators = [np.random.default_rng(seed) for seed in range(SEEDS)]
    base = np.exp([spread * generator.normal(size=answers) for generator in generators])
    right = np.array([generator.permutation(np.arange(answers) < correct)
                      for generator in generators])
    return base / base.sum(axis=1, keepdims=True), right


def figures(policy, base, right):
    """(correctness, normalised variance, KL(policy || base), largest share of one correct answer),
    each (SEEDS,)."""
    correctness = (policy * right).sum(axis=1)
    share = policy * right / correctness[:, None]
    variance = right.sum(axis=1) * (share**2).sum(axis=1) - 1
    kl = (policy * np.log(policy / base)).sum(axis=1)
    return np.array([correctness, variance, kl, share.max(axis=1)])


def step(policy, right, gamma_p, gamma_n):
    """(A^DS, the gradient of the logits), each (SEEDS, answers)."""
    p = (policy * right).sum(axis=1, keepdims=True)
    advantage = (right - p) / (np.sqrt(p * (1 - p)) + 1e-6)
    advantage = advantage + np.where(right, -gamma_p, gamma_n) * np.log(policy)
    return advantage, policy * (advantage - (policy * advantage).sum(axis=1, keepdims=True))


@functools.cache  # several tests compare the same paths
def path(gamma_p, gamma_n, shape=SHAPES[0], updates=1500, lr=0.05):
    """`figures` before each update: (updates, 4, SEEDS)."""
    base, right = base_policies(*shape)
    logits, steps = np.log(base), []
    for _ in range(updates):
        policy = np.exp(logits - logits.max(axis=1, keepdims=True))
        policy /= policy.sum(axis=1, keepdims=True)
        steps.append(figures(policy, base, right))
        logits = logits + lr * step(policy, right, gamma_p, gamma_n)[1]
    return np.array(steps)


def at_level(steps, which, level):
    """`figures` where figure `which` first reaches `level`, interpolated: (4, SEEDS); NaN where it
    never does."""
    after = np.argmax(steps[:, which] >= level, axis=0)     # (SEEDS,)
    seeds = np.arange(steps.shape[2])
    one, two = steps[after - 1, :, seeds], steps[after, :, seeds]       # (SEEDS, 4)
    weight = (level - one[:, which]) / (two[:, which] - one[:, which])
    return np.where(after > 0, (one + weight[:, None] * (two - one)).T, np.nan)


def test_update_is_the_gradient_of_the_expected_objective():
    """It equals the finite difference of sum pi_old(y) ratio(y) A(y) at ratio 1, logit by logit."""
    base, right = (one[:1] for one in base_policies(answers=7, correct=3))
    advantage, exact = step(base, right, 0.3, 0.03)

    def objective(logits):
        policy = np.exp(logits) / np.exp(logits).sum()
        return (base * (policy / base) * advantage).sum()

    logits, size = np.log(base), 1e-6
    numeric = [(objective(logits + size * unit) - objective(logits - size * unit)) / (2 * size)
               for unit in np.eye(7)]
    np.testing.assert_allclose(exact[0], numeric, atol=1e-8)


@pytest.mark.parametrize("shape", SHAPES)
def test_grpo_concentrates_on_the_likelier_correct_answers(shape):
    """An answer's logit grows by pi(y) A: of two correct ones the likelier gains more, always."""
    steps = path(0, 0, shape)
    correctness, variance, share = steps[:, 0], steps[:, 1], steps[:, 3]
    assert (np.diff(correctness, axis=0) > -1e-12).all()
    assert (np.diff(variance, axis=0) > -1e-12).all()
    assert (share[-1] > share[0] + 0.1).all() and variance[-1].mean() > 2 * variance[0].mean()


@pytest.mark.parametrize("shape, gamma_p", [
    (SHAPES[0], 0.1), *((shape, 0.3) for shape in SHAPES[1:])])
def test_ds_grpo_is_more_diverse_and_no_less_correct_within_the_same_kl_budget(shape, gamma_p):
    """The measure of Theorem 3.4. Correctness is higher for every base policy at every budget; the
    variance is lower for every one at a KL of 0.25 and above, and for at least 17 of 20 at the very
    start (a few peaked ones lag)."""
    grpo, smooth = path(0, 0, shape), path(gamma_p, gamma_p / 10, shape)
    for budget, lower_in in ((0.03, 17), (0.25, SEEDS), (0.5, SEEDS)):
        one, two = at_level(grpo, 2, budget), at_level(smooth, 2, budget)
        # Where a correct answer is very likely, KL stays below 0.5.
        reached = np.isfinite(one[0] + two[0])
        assert reached.sum() >= SEEDS - 1 and (two[0] > one[0])[reached].all()
        assert (two[1] < one[1])[reached].sum() >= min(lower_in, reached.sum())


def test_uniform_bonus_and_penalty_trade_correctness_against_diversity():
    """The same number of updates, gamma_p = -gamma_n: each step towards more bonus lowers variance
    and correctness, so that no coefficient has both of DS-GRPO's gains over GRPO (in the means)."""
    updates = np.argmax(path(0, 0)[:, 0] >= 0.8, axis=0)

    def after(*gammas):
        return path(*gammas)[updates, :, range(SEEDS)].T

    arms = [after(gamma, -gamma) for gamma in (-0.3, -0.1, -0.03, 0, 0.03, 0.1, 0.3)]
    for one, two in zip(arms, arms[1:]):
        assert (two[0] < one[0]).all() and (two[1] < one[1]).all()
    grpo, smooth = after(0, 0), after(0.3, 0.03)
    assert (smooth[0] > grpo[0]).all() and smooth[1].mean() < grpo[1].mean() - 0.2
    for uniform in arms:
        assert not (uniform[0].mean() >= smooth[0].mean() and uniform[1].mean() <= smooth[1].mean())


def optimum(base, right, exponent_right, exponent_wrong, tilt):
    """The optimum of an objective with KL to the base: base^exponent, times e^tilt on correct
    answers, normalised."""
    policy = np.where(right, base**exponent_right * np.exp(tilt), base**exponent_wrong)
    return policy / policy.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("alpha", [-0.5, -0.1, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("beta", [0.6, 3.0])
def test_theorem_3_4_on_the_optima_themselves(alpha, beta):
    """Every entropy-regularised optimum is matched or beaten, in both figures, by a smoothed one
    with no more KL.

    max E[r] + alpha H(pi) - beta KL(pi || base) has its optimum at base^(beta / (alpha + beta))
    e^(r / (alpha + beta)). max E[r_DS] - b KL(pi || base), with r_DS of Eq. 4 and reward R for a
    correct answer, has it at base^(1 - gamma_p / b) e^(R / b) on correct answers and
    base^(1 + gamma_n / b) on wrong ones. Against a bonus (alpha > 0) take its exponent on the
    correct answers, against a penalty exponent 1 (gamma_p = 0); gamma_n = 0; and R / b, the free
    scale, such that the rival's KL is spent.
    """
    base, right = base_policies()
    exponent = beta / (alpha + beta)
    rival = figures(optimum(base, right, exponent, exponent, 1 / (alpha + beta)), base, right)
    low, high = np.full((SEEDS, 1), -60.0), np.full((SEEDS, 1), 60.0)
    # Bisection of R / b, with which correctness grows, and KL from the rival's correctness on.
    for _ in range(60):
        tilt = (low + high) / 2
        smooth = figures(optimum(base, right, min(exponent, 1), 1, tilt), base, right)
        more = ((smooth[0] < rival[0]) | (smooth[2] <= rival[2]))[:, None]
        low, high = np.where(more, tilt, low), np.where(more, high, tilt)
    smooth = figures(optimum(base, right, min(exponent, 1), 1, low), base, right)
    assert (smooth[2] <= rival[2] + 1e-9).all()
    assert (smooth[0] > rival[0]).all() and (smooth[1] <= rival[1] + 1e-9).all()
    assert alpha > 0 or (smooth[1] < rival[1]).all()


def table():
    """The README's table: means over SEEDS base policies of 40 answers, 10 of them correct."""
    base, right = base_policies()
    paths = {name: path(*gammas, updates=8000) for name, gammas in ARMS.items()}
    updates = np.argmax(paths["GRPO"][:, 0] >= 0.8, axis=0)
    start = figures(base, base, right).mean(axis=1)
    yield ("arm", "gamma_p", "gamma_n", "correctness", "variance", "KL", "correctness at KL 0.5",
           "variance at KL 0.5", "updates to 0.95", "variance there")
    yield ("base", "", "", f"{start[0]:.3f}", f"{start[1]:.2f}", "0", "", "", "", "")
    for name, steps in paths.items():
        late = np.argmax(steps[:, 0] >= 0.95, axis=0)
        equal, budget, end = (one.mean(axis=1) for one in (
            steps[updates, :, range(SEEDS)].T, at_level(steps, 2, 0.5), at_level(steps, 0, 0.95)))
        yield (name, *map(str, ARMS[name]), f"{equal[0]:.3f}", f"{equal[1]:.2f}", f"{equal[2]:.2f}",
               f"{budget[0]:.3f}", f"{budget[1]:.2f}", f"{late.mean():.0f}", f"{end[1]:.2f}")


if __name__ == "__main__":
    for line in table():
        print("| " + " | ".join(line) + " |")
