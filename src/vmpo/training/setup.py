"""From a configuration to the parts of a run: policy with adapter, kernel, rewards, prompts."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch

from vmpo.errors import UserError
from vmpo.kernels import Kernel, build_kernel
from vmpo.objectives import Objective, get_objective
from vmpo.policies.adapters import add_lora
from vmpo.policies.loading import DTYPES, Loading, load_policy, policy_class_of
from vmpo.policies.pipeline import Call, PipelinePolicy
from vmpo.policies.policy import Policy
from vmpo.policies.value_network import ValueNetwork
from vmpo.prompts import PromptSet, load_prompts
from vmpo.rewards import Reward, check_prompts, load_reward
from vmpo.training.config import Config
from vmpo.training.learned_terms import LearnedTerms


@dataclass(frozen=True)
class Parts:
    """What a configuration names, loaded."""

    policy: PipelinePolicy
    kernel: Kernel
    objective: Objective
    rewards: dict[str, Reward]
    train: PromptSet
    test: PromptSet


def call_of(config: Config) -> Call:
    """How a configuration calls its networks."""
    model = config.model
    return Call(
        height=model.height,
        width=model.width,
        guidance=model.guidance,
        max_sequence_length=model.max_sequence_length,
        autocast=DTYPES[model.autocast],
        offload_encoders=model.offload_encoders,
    )


def loading_of(config: Config) -> Loading:
    """Which weights a configuration loads, and how they are kept."""
    return Loading(**{field.name: getattr(config.model, field.name) for field in fields(Loading)})


def load_policy_of(config: Config, device: torch.device | str = "cpu") -> PipelinePolicy:
    """The pretrained model of a configuration, without adapter."""
    return load_policy(config.model.path, call_of(config), loading_of(config), device)


def load_kernel_of(config: Config, policy: PipelinePolicy) -> Kernel:
    """The sampler of a configuration, on the noise schedule of the policy's model."""
    sampler = config.sampler
    return build_kernel(
        sampler.kernel,
        sampler.steps,
        eta=sampler.eta,
        shift=sampler.shift,
        schedule=sampler.schedule,
        window=sampler.window,
        **policy.schedule,
    )


def check_sampler(config: Config) -> None:
    """The kernel must be one of the model's kind and have a stochastic step; looks at no weights.

    Raises:
        UserError: otherwise.
    """
    sampler, model = config.sampler, config.model
    policy_class = policy_class_of(model.path, model.revision)
    if policy_class.flow == (sampler.kernel == "ddim"):
        kind, right = (
            ("flow model", "flow_grpo, dance or cps") if policy_class.flow else ("noise-predicting model", "ddim")
        )
        raise UserError(
            f"sampler.kernel={sampler.kernel} does not go with model '{model.path}', a {kind}: "
            f"set sampler.kernel to {right}"
        )
    if sampler.eta == 0:
        raise UserError(
            f"sampler.kernel={sampler.kernel} with eta=0 has no stochastic step, hence no density to train on; set "
            f"sampler.eta above 0"
        )


def load_objective_of(config: Config) -> Objective:
    """The named composition, with the parts that the configuration sets itself.

    Raises:
        UserError: if there is no such method, or the parts do not make a sound one.
    """
    objective = replace(get_objective(config.objective.name), **config.objective.parts())
    grouped = objective.centre == "group" or objective.standardise == "group" or config.reward.combine != "sum"
    if grouped and config.optimisation.group < 2:
        raise UserError(
            f"optimisation.group=1 leaves objective '{objective.name}' nothing to compare a picture with; 2 or more is "
            f"right, or an objective whose centre is learned or the batch's"
        )
    return objective


def density_scale(objective: Objective, policy: Policy) -> float:
    """What log-densities are multiplied by in the objective: 1, or 1/D where its log_prob is the mean.

    The exact densities are then tilted at the temperature beta times this scale (docs/concepts.md).
    """
    return 1.0 if objective.log_prob == "sum" else 1.0 / math.prod(policy.state_shape)


def load_rewards_of(config: Config) -> dict[str, Reward]:
    """Trained-on and held-out rewards, by name."""
    return {name: load_reward(use, options) for name, (use, options) in config.reward.sources().items()}


def load_prompts_of(config: Config, rewards: dict[str, Reward]) -> tuple[PromptSet, PromptSet]:
    """Training and held-out prompts, each checked by every reward that asks something of a prompt."""
    train, test = load_prompts(config.prompts.train), load_prompts(config.prompts.test)
    for prompts in (train, test):
        check_prompts(rewards, prompts.prompts)
    return train, test


def learned_terms(parts: Parts, seed: int) -> LearnedTerms:
    """What the objective learns beside the policy, untrained; the same for the same seed."""
    policy, kernel, train = parts.policy, parts.kernel, parts.train

    def network() -> ValueNetwork:
        example = policy.encode([train.prompts[0]])
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return ValueNetwork(policy.state_shape, example, kernel.num_steps).to(policy.device)

    return LearnedTerms.build(parts.objective, kernel.stochastic_steps, len(train), network)


def check_gradients(objective: Objective, kernel: Kernel, rewards: dict[str, Reward]) -> None:
    """A loss of gradients needs rewards that have one, and steps that follow each other.

    Raises:
        UserError: otherwise, with the reward's name.
    """
    if objective.loss != "gradient":
        return
    for name, reward in rewards.items():
        if not reward.differentiable:
            raise UserError(
                f"objective '{objective.name}' follows the gradient of the reward, and '{name}' has none; use a "
                f"differentiable reward, or an objective that only needs its values, such as vmpo_diff"
            )
    steps = kernel.stochastic_steps
    if bool((steps.diff() != 1).any()):
        raise UserError(
            f"objective '{objective.name}' needs stochastic steps that follow each other, not {steps.tolist()}; "
            f"set sampler.window"
        )


def load_parts(config: Config, device: torch.device | str, policy: PipelinePolicy | None = None) -> Parts:
    """Loads everything a run needs; cheap checks first.

    Args:
        policy: the pretrained model, if it is there already.

    Raises:
        UserError: if something is missing, or the parts do not fit together.
    """
    objective = load_objective_of(config)
    if policy is None:
        check_sampler(config)
    rewards = load_rewards_of(config)
    train, test = load_prompts_of(config, rewards)
    policy = policy or load_policy_of(config, device)
    kernel = load_kernel_of(config, policy)
    check_gradients(objective, kernel, {name: rewards[name] for name in config.reward.weights})
    lora = config.model.lora
    add_lora(policy, lora.rank, lora.alpha, lora.targets, config.seed)
    return Parts(policy, kernel, objective, rewards, train, test)
