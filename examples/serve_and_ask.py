"""Serves a pruned checkpoint with vLLM and asks it a question, or asks a server that already runs.

    python examples/serve_and_ask.py CHECKPOINT [--question TEXT]
    python examples/serve_and_ask.py --url http://HOST:PORT/v1 [--question TEXT]

Needs `pip install '.[cuda]' openai`. Other options go to vLLM: on a CPU, `--dtype float32 --enforce-eager`,
with VLLM_CPU_KVCACHE_SPACE=1 in the environment, without which vLLM takes 0.92 of all memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

from openai import APIConnectionError, OpenAI

PORT = 8017


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--url", help="of a running server")
    parser.add_argument("--question", default="How many days does a week have?")
    options, for_vllm = parser.parse_known_args()
    if (options.checkpoint is None) == (options.url is None):
        parser.error("name a checkpoint or a --url")
    if options.url:
        ask(OpenAI(base_url=options.url, api_key="none"), options.question)
        return

    # As `vllm serve CHECKPOINT --quantization spense`, which vllm-cpu's command does not offer.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", options.checkpoint]
    server = subprocess.Popen([*command, "--quantization", "spense", "--port", str(PORT), *for_vllm])
    try:
        client = OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", max_retries=0)
        wait_until_ready(client, server)
        ask(client, options.question)
    finally:
        server.terminate()
        server.wait()


def wait_until_ready(client: OpenAI, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            client.models.list()
            return
        except APIConnectionError:
            time.sleep(1)
    raise SystemExit(f"the server ended with code {server.returncode}; its last lines are above")


def ask(client: OpenAI, question: str) -> None:
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": question}]
    reply = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=64)
    print(f"\nquestion  {question}\nanswer    {reply.choices[0].message.content}")


if __name__ == "__main__":
    main()
