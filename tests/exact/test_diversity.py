"""Variances of pictures and their errors against distributions whose variance is known."""

from __future__ import annotations

import math

import pytest
import torch

from vmpo.evaluation.diversity import (
    embedding_variance,
    embedding_variances,
    mean_pairwise_distance,
    mean_pairwise_distances,
    total_variance,
    total_variances,
    vendi_score,
    vendi_scores,
    weighted_total_variance,
    weighted_total_variances,
)
from vmpo.evaluation.statistics import clustered_mean, paired_difference

SCALES = torch.tensor([0.5, 1.5, 2.0], dtype=torch.float64)


def normal(prompts: int, pictures: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(prompts, pictures, 3, generator=generator, dtype=torch.float64) * SCALES + 4.0


def test_total_variance_is_half_the_mean_squared_distance_of_ordered_pairs() -> None:
    x = normal(2, 5, 0)
    for p in range(2):
        pairs = [(x[p, i] - x[p, j]).square().sum().item() for i in range(5) for j in range(5) if i != j]
        assert total_variances(x)[p].item() == pytest.approx(0.5 * sum(pairs) / len(pairs))


def test_total_variance_is_unbiased_even_for_two_pictures() -> None:
    estimate = total_variance(normal(20_000, 2, 1))
    assert abs(estimate.mean - SCALES.square().sum().item()) < 4 * estimate.se
    assert estimate.se < 0.1
    assert estimate.n == 20_000


def test_variance_of_embeddings_is_that_of_the_published_evaluation() -> None:
    x = normal(3, 10, 10) - 4.0
    for p in range(3):
        unit = [row / row.square().sum().sqrt() for row in x[p]]
        squares = sum((a - b).square().sum().item() for a in unit for b in unit)
        assert embedding_variances(x)[p].item() == pytest.approx(squares / (2 * 10 * 9))
        cosines = [(unit[i] @ unit[j]).item() for i in range(10) for j in range(10) if i != j]
        assert embedding_variances(x)[p].item() == pytest.approx(1 - sum(cosines) / len(cosines))
    torch.testing.assert_close(embedding_variances(x), mean_pairwise_distances(x, "cosine"))
    scales = torch.rand(3, 10, 1, generator=torch.Generator().manual_seed(11), dtype=torch.float64) + 0.5
    torch.testing.assert_close(embedding_variances(x * scales), embedding_variances(x))  # lengths do not matter
    assert embedding_variance(x).mean == pytest.approx(embedding_variances(x).mean().item())


@pytest.mark.parametrize("angle", [0.0, 1e-6, 0.4, math.pi / 2, math.pi])
def test_variance_of_two_embeddings_is_one_minus_the_cosine_of_their_angle(angle: float) -> None:
    x = torch.tensor([[[3.0, 0.0], [0.2 * math.cos(angle), 0.2 * math.sin(angle)]]], dtype=torch.float64)
    expected = 2 * math.sin(angle / 2) ** 2
    for found in (embedding_variances(x), mean_pairwise_distances(x, "cosine")):
        assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-30)


def test_variance_of_embeddings_is_that_of_the_population() -> None:
    # directions uniform on the sphere: the mean embedding is 0 and the total variance 1
    x = torch.randn(4000, 2, 5, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    estimate = embedding_variance(x)
    assert abs(estimate.mean - 1) < 4 * estimate.se
    assert estimate.se < 0.02


def test_equal_weights_change_nothing() -> None:
    x = normal(7, 6, 2)
    for correct in (True, False):
        torch.testing.assert_close(weighted_total_variances(x, torch.full((7, 6), -3.2), correct), total_variances(x))


def test_weighted_variance_is_the_ratio_of_pairs() -> None:
    x, log_w = normal(1, 5, 3), torch.randn(1, 5, generator=torch.Generator().manual_seed(3))
    w = log_w.double().softmax(1)[0]
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    above = sum((w[i] * w[j] * 0.5 * (x[0, i] - x[0, j]).square().sum()).item() for i, j in pairs)
    below = sum((w[i] * w[j]).item() for i, j in pairs)
    assert weighted_total_variances(x, log_w, correct_bias=False).item() == pytest.approx(above / below)


def test_weighted_variance_finds_the_tilted_one_and_its_bias_is_the_derived_one() -> None:
    # x in {0, 1, 4}; tilted by weights that grow with the distance, so that the first-order bias is large
    values = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float64)
    probs, w = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64), torch.tensor([0.8, 1.0, 1.6], dtype=torch.float64)
    ratio = w / (probs * w).sum()
    tilted = probs * ratio
    mu = (tilted * values).sum()
    variance = (tilted * (values - mu).square()).sum().item()

    m = 24
    index = torch.multinomial(probs, 60_000 * m, True, generator=torch.Generator().manual_seed(4)).view(-1, m)
    x, log_w = values[index].unsqueeze(-1), w.log()[index]
    plain = weighted_total_variance(x, log_w, correct_bias=False)
    corrected = weighted_total_variance(x, log_w)
    bias = -2 / m * (tilted * ratio * ((values - mu).square() - variance)).sum().item()
    assert abs(bias) > 10 * plain.se
    assert plain.mean - variance == pytest.approx(bias, rel=0.2)
    assert abs(corrected.mean - variance) < 0.35 * abs(bias)


def test_one_sample_with_all_the_weight_says_nothing_of_spread() -> None:
    log_w = torch.tensor([[0.0, -torch.inf, -torch.inf]])
    assert weighted_total_variances(normal(1, 3, 5), log_w).isnan().all()


def test_mean_pairwise_distance() -> None:
    x = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]])
    assert mean_pairwise_distance(x).mean == pytest.approx(10 / 3)
    # two normal numbers of deviation s differ by 2s/sqrt(pi) on average
    one = normal(4000, 4, 6)[..., 1:2]
    estimate = mean_pairwise_distance(one)
    assert abs(estimate.mean - 2 * 1.5 / math.sqrt(math.pi)) < 4 * estimate.se


def test_mean_squared_distance_is_twice_the_total_variance() -> None:
    x = normal(4, 6, 13)
    torch.testing.assert_close(mean_pairwise_distances(x, "squared_euclidean"), 2 * total_variances(x))


def test_a_failed_picture_leaves_its_prompt_out() -> None:
    x = normal(3, 4, 14)
    x[1, 2] = torch.nan
    measures = (total_variances, embedding_variances, mean_pairwise_distances, vendi_scores)
    for measure in measures:
        assert measure(x).isnan().tolist() == [False, True, False]
    assert vendi_score(x).n == 2


@pytest.mark.parametrize("count", [2, 7])
def test_vendi_score_of_equal_and_of_orthogonal_pictures(count: int) -> None:
    equal = torch.tensor([[0.3, -2.0, 5.0]]).expand(1, count, 3)
    assert vendi_scores(equal).item() == pytest.approx(1.0)
    assert vendi_scores(3 * torch.eye(count)[None]).item() == pytest.approx(count)


def test_vendi_score_of_two_pictures() -> None:
    # K/2 = ((1, c), (c, 1))/2 has the eigenvalues (1 ± c)/2
    c = 0.6
    x = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]], dtype=torch.float64)
    entropy = -sum(v * math.log(v) for v in ((1 + c) / 2, (1 - c) / 2))
    assert vendi_scores(x).item() == pytest.approx(math.exp(entropy))


def test_vendi_score_is_the_published_one() -> None:
    # vendi.score_X of vendi-score 0.0.3
    x = torch.sin(torch.arange(40, dtype=torch.float64).view(2, 5, 4) ** 1.5)
    assert vendi_scores(x).tolist() == pytest.approx([3.4904266736306653, 3.0825528560530806], rel=1e-10)


def test_vendi_score_counts_kinds() -> None:
    basis = torch.eye(4)[[0, 1, 2, 0, 1, 2]].unsqueeze(0) * 7.0
    assert vendi_score(basis).mean == pytest.approx(3.0)
    assert vendi_score(basis[:, [0, 3]]).mean == pytest.approx(1.0)


def test_errors_are_those_between_prompts() -> None:
    generator = torch.Generator().manual_seed(8)
    difficulty = torch.randn(300, 50, 1, generator=generator)
    values = difficulty + 0.3 * torch.randn(300, 50, 6, generator=generator)
    estimates = [clustered_mean(v) for v in values]
    spread = torch.tensor([e.mean for e in estimates]).std().item()
    assert sum(e.se for e in estimates) / 300 == pytest.approx(spread, rel=0.12)
    naive = values[0].std().item() / math.sqrt(300)
    assert naive < 0.6 * spread  # as if pictures of a prompt were independent


def test_clustered_mean_leaves_out_failures() -> None:
    values = torch.tensor([[1.0, torch.nan], [2.0, 4.0], [torch.nan, torch.nan]])
    estimate = clustered_mean(values)
    assert (estimate.mean, estimate.n) == (2.0, 2)
    assert estimate.se == pytest.approx(math.sqrt(2) / math.sqrt(2))
    assert math.isnan(clustered_mean(values[:1]).se)
    assert clustered_mean(values[2:]).n == 0


def test_pairs_cancel_the_difficulty_of_prompts() -> None:
    generator = torch.Generator().manual_seed(9)
    difficulty = 5 * torch.randn(100, 1, generator=generator)
    base = difficulty + torch.randn(100, 4, generator=generator)
    aligned = difficulty + 0.7 + torch.randn(100, 6, generator=generator)
    gain = paired_difference(base, aligned)
    assert abs(gain.mean - 0.7) < 4 * gain.se
    assert gain.se == pytest.approx(math.sqrt(1 / 400 + 1 / 600), rel=0.2)
    with pytest.raises(ValueError, match="same ones"):
        paired_difference(base, aligned[:50])


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="must be"):
        total_variance(torch.zeros(3, 1, 2))
    with pytest.raises(ValueError, match="ask for"):
        weighted_total_variance(torch.zeros(3, 2, 2), torch.zeros(3, 3))
