"""Every potential: the steps' sum (Eq. 36), the temperature, masked rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vmpo.potentials import difference, initial_log_potential, return_to_go, terminal

torch.set_num_threads(1)
BETA, N, S = 0.37, 6, 4
NAN = float("nan")


def random_values() -> Tensor:
    return torch.randn(N, S + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def without_columns(values: Tensor, columns: list[int]) -> Tensor:
    values = values.clone()
    values[:, columns] = NAN
    return values


@pytest.mark.parametrize("potential", [return_to_go, terminal])
def test_reward_potentials_sum_to_the_tempered_reward(potential) -> None:
    reward = random_values()[:, -1]
    delta_phi = potential(reward, S, BETA)
    assert delta_phi.shape == (N, S)
    torch.testing.assert_close(delta_phi.sum(1), reward / BETA, rtol=1e-12, atol=1e-12)


def test_return_to_go_is_uniform_and_without_per_step_leaves_the_share_out() -> None:
    reward = random_values()[:, -1]
    torch.testing.assert_close(return_to_go(reward, S, BETA), (reward / (S * BETA))[:, None].expand(N, S))
    torch.testing.assert_close(return_to_go(reward, S, BETA, per_step=False), (reward / BETA)[:, None].expand(N, S))


def test_terminal_leaves_the_steps_before_the_last_alone() -> None:
    assert (terminal(random_values()[:, -1], S, BETA)[:, :-1] == 0).all()


@pytest.mark.parametrize("unevaluated", [[], [0], [2], [1, 2], [0, 1], [0, 1, 2, 3]])
def test_differences_telescope_up_to_the_noise_term(unevaluated: list[int]) -> None:
    values = without_columns(random_values(), unevaluated)
    delta_phi = difference(values, BETA)
    expected = values[:, -1] / BETA
    if 0 not in unevaluated:
        expected = expected - values[:, 0] / BETA
    torch.testing.assert_close(delta_phi.sum(1), expected, rtol=1e-12, atol=1e-12)
    whole = delta_phi.sum(1) + initial_log_potential(values, BETA)
    torch.testing.assert_close(whole, values[:, -1] / BETA, rtol=1e-12, atol=1e-12)


def test_difference_of_a_fully_evaluated_trajectory_is_each_steps_gain() -> None:
    values = random_values()
    torch.testing.assert_close(difference(values, BETA), (values[:, 1:] - values[:, :-1]) / BETA)


def test_the_gain_is_credited_to_the_step_that_reaches_the_next_evaluated_state() -> None:
    values = torch.tensor([[1.0, NAN, NAN, 4.0, 6.0]], dtype=torch.float64)
    expected = torch.tensor([[0.0, 0.0, 3.0, 2.0]], dtype=torch.float64) / BETA
    torch.testing.assert_close(difference(values, BETA), expected)


def test_an_unevaluated_start_counts_as_zero() -> None:
    values = torch.tensor([[NAN, NAN, 2.5, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(difference(values, BETA), torch.tensor([[0.0, 2.5, 1.5]], dtype=torch.float64) / BETA)


def test_difference_without_intermediate_rewards_is_terminal() -> None:
    values = without_columns(random_values(), [0, 1, 2, 3])
    torch.testing.assert_close(difference(values, BETA), terminal(values[:, -1], S, BETA))


@pytest.mark.parametrize("column", range(S + 1))
def test_a_failed_intermediate_reward_masks_its_row_alone(column: int) -> None:
    values = random_values()
    values[2, column] = NAN
    delta_phi = difference(values, BETA)
    assert delta_phi[2].isnan().all()
    others = torch.arange(N) != 2
    torch.testing.assert_close(delta_phi[others], difference(random_values(), BETA)[others])
    assert initial_log_potential(values, BETA).isnan().tolist() == (~others).tolist()


@pytest.mark.parametrize("potential", [return_to_go, terminal])
def test_a_failed_reward_masks_its_row_alone(potential) -> None:
    reward = random_values()[:, -1]
    reward[4] = NAN
    rows = potential(reward, S, BETA).isnan()
    assert rows[4].all()
    assert int(rows.sum()) == S


def test_rewards_that_all_failed_mask_every_row() -> None:
    assert difference(without_columns(random_values(), [S]), BETA).isnan().all()
    assert terminal(torch.full((N,), NAN), S, BETA).isnan().all()
