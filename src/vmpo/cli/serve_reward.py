"""`vmpo serve-reward`."""

from __future__ import annotations

import ipaddress
import json
import os
from typing import Annotated

import typer

from vmpo.cli.app import app, console
from vmpo.errors import UserError


@app.command()
def serve_reward(
    name: Annotated[str, typer.Argument(help="A built-in reward or 'module:name'.")],
    option: Annotated[list[str] | None, typer.Option(help="key=value of the reward, as YAML; repeatable.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8765,
    batch: Annotated[int, typer.Option(min=1, help="Pictures scored at a time.")] = 16,
    max_mb: Annotated[int, typer.Option(min=1, help="Largest request, in MB.")] = 256,
    token_env: Annotated[
        str | None, typer.Option(help="Environment variable that holds the token a client must bear.")
    ] = None,
) -> None:
    """Serve a reward to training runs on other machines or in other environments."""
    # nothing of diffusers or transformers: a reward may need an environment with older versions of them
    from vmpo.rewards import load_reward
    from vmpo.rewards.server import RewardServer
    from vmpo.rewards.service import RewardService
    from vmpo.training.recipes import apply_override

    options: dict[str, object] = {}
    for text in option or []:
        apply_override(options, text)
    token = os.environ.get(token_env, "") if token_env else None
    if token == "":
        raise UserError(f"the environment variable '{token_env}' (--token-env) is not set; it must hold the token")
    service = RewardService(name, load_reward(name, options), options, batch)
    server = RewardServer(service, host, port, max_bytes=max_mb * 10**6, token=token)
    alias = name.rpartition(":")[2]
    use = {alias: {"use": "remote", "endpoints": [server.url]} | ({"key_env": token_env} if token_env else {})}
    recipe = f"'reward.weights={{{alias}: 1.0}}' 'reward.options={json.dumps(use)}'"
    console.print(f"serving {name} at {server.url}; in a run: {recipe}", soft_wrap=True, markup=False)
    if token is None and not _loopback(host):
        console.print("anyone who reaches this address can use it; --token-env asks for a token", soft_wrap=True)
    server.serve_until_stopped()
    console.print(f"stopped; {service.scored} pictures scored, {service.failed} without a score")


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
